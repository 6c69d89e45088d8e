"""Quantizers written as a search for the nearest row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stage1_vq.interop.nearest_form import fsq_places, largest_dot_as_nearest, nearest_form
from stage1_vq.quantizers import FSQConfig, FSQQuantizer, ResidualConfig, ResidualQuantizer, build_quantizer
from taming.errors import ArtifactError
from tests.stage1_vq.interop.published import small_model


@pytest.mark.parametrize("levels", range(3, 18))
def test_fsq_rounds_where_two_places_are_equally_near(levels: int):
    quantizer = FSQQuantizer(FSQConfig(levels=(levels,)))
    places = fsq_places(levels)
    latents = torch.linspace(-9, 9, 4001)[:, None]
    nearest = (latents.double() - places).abs().argmin(1)
    different = (nearest != quantizer.choose(latents)).sum()
    # A latent may lie on a threshold to within fp32.
    assert int(different) <= 1
    assert nearest.unique().numel() == levels


def test_the_largest_logit_is_the_nearest_row():
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(50, 6, generator=generator), torch.randn(50, generator=generator)
    latents = torch.randn(400, 6, generator=generator)
    rows = largest_dot_as_nearest(weight, bias)
    extended = torch.cat((latents, torch.zeros(400, 1)), dim=1)
    logits = (latents.double() @ weight.double().T + bias).argmax(1)
    assert torch.equal(torch.cdist(extended.double(), rows.double()).argmin(1), logits)
    assert logits.unique().numel() > 10


@pytest.mark.parametrize("kind", ["nearest", "ema", "simvq", "fsq", "lfq", "bsq", "ibq", "gumbel"])
def test_the_search_gives_the_quantizers_codes(kind: str):
    options = {"fsq": {"levels": [5, 4, 3]}, "lfq": {"num_bits": 5}, "bsq": {"num_bits": 5}}
    width = {"codebook_size": 40, "code_dim": 4}
    model = small_model(quantizer={"kind": kind, **options.get(kind, width)})
    form = nearest_form(model.quantize)
    latents: Tensor = model.latents(torch.rand(2, 3, 32, 32) * 2 - 1).detach()
    rows = latents.permute(0, 2, 3, 1).flatten(0, 2)
    extended = torch.nn.functional.pad(rows, (0, form.searched.shape[1] - rows.shape[1])).double()
    found = torch.cdist(extended, form.searched.double()).argmin(1)
    codes = model.quantize.encode(latents)
    assert torch.equal(found, codes.flatten())
    assert codes.unique().numel() >= 8
    decoded = model.quantize.lookup(codes).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(form.codes[found], decoded)


def test_residual_codes_are_no_such_search():
    quantizer = ResidualQuantizer(ResidualConfig(codes_per_stage=4, code_dim=4))
    with pytest.raises(ArtifactError, match="kind residual does not search for the nearest row of one table"):
        nearest_form(quantizer)
    assert build_quantizer(ResidualConfig(codes_per_stage=4, code_dim=4)).codebook_size == 16
