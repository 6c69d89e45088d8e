"""What every member of the quantizer union promises."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import TypeAdapter

from stage1_vq.quantizers import (
    EMAConfig,
    EMAQuantizer,
    GumbelConfig,
    NearestConfig,
    NearestQuantizer,
    Quantizer,
    QuantizerConfig,
    build_quantizer,
)

CONFIGS = [
    NearestConfig(codebook_size=24, code_dim=6),
    NearestConfig(codebook_size=24, code_dim=6, beta_on="codebook"),
    NearestConfig(codebook_size=24, code_dim=6, l2_normalised=True),
    NearestConfig(codebook_size=24, code_dim=6, kmeans_init=True, revive_after=2, l2_normalised=True),
    EMAConfig(codebook_size=24, code_dim=6),
    GumbelConfig(codebook_size=24, code_dim=6),
]


def name(config: QuantizerConfig) -> str:
    return "-".join(str(value) for value in config.model_dump(exclude_defaults=True).values()) or config.kind


@pytest.fixture(params=CONFIGS, ids=name)
def quantizer(request: pytest.FixtureRequest) -> Quantizer:
    torch.manual_seed(0)
    return build_quantizer(request.param)


def latents(quantizer: Quantizer, *, seed: int = 1) -> torch.Tensor:
    return torch.randn(2, quantizer.code_dim, 4, 5, generator=torch.Generator().manual_seed(seed))


def test_every_kind_of_the_union_has_a_case():
    schema = TypeAdapter(QuantizerConfig).json_schema()
    kinds = set(schema.get("discriminator", {}).get("mapping", {})) or {schema["properties"]["kind"]["const"]}
    assert kinds == {config.kind for config in CONFIGS}


def test_shapes_types_and_ranges(quantizer: Quantizer):
    output = quantizer(latents(quantizer))
    assert output.quantized.shape == (2, quantizer.code_dim, 4, 5)
    assert output.indices.shape == (2, 4, 5)
    assert output.indices.dtype == torch.int64
    assert output.indices.min() >= 0
    assert output.indices.max() < quantizer.codebook_size
    assert output.loss.shape == ()
    assert all(term.shape == () and not term.requires_grad for term in output.terms.values())
    assert quantizer.codebook.shape == (quantizer.codebook_size, quantizer.code_dim)


def test_lookup_gives_what_forward_gave(quantizer: Quantizer):
    quantizer.eval()
    output = quantizer(latents(quantizer))
    torch.testing.assert_close(quantizer.lookup(output.indices), output.quantized, rtol=0, atol=1e-6)


def test_a_code_is_its_own_code(quantizer: Quantizer):
    if not isinstance(quantizer, NearestQuantizer | EMAQuantizer):
        pytest.skip("the latents of this method do not live among its codes")
    quantizer.eval()
    codes = torch.arange(quantizer.codebook_size).view(1, 4, -1)
    assert torch.equal(quantizer(quantizer.lookup(codes)).indices, codes)


def test_encode_is_forward_in_evaluation(quantizer: Quantizer):
    z = latents(quantizer)
    before = copy.deepcopy(quantizer.state_dict())
    codes = quantizer.encode(z)
    assert torch.equal(codes, quantizer.encode(z))
    assert all(torch.equal(before[key], value) for key, value in quantizer.state_dict().items())
    assert torch.equal(codes, quantizer.eval()(z).indices)


def test_every_parameter_and_the_latents_get_a_gradient(quantizer: Quantizer):
    z = latents(quantizer).requires_grad_()
    output = quantizer(z)
    (output.quantized.square().sum() + output.loss).backward()
    assert z.grad.abs().sum() > 0
    for parameter in quantizer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_state_round_trips(quantizer: Quantizer):
    for seed in range(3):
        quantizer(latents(quantizer, seed=seed))
        quantizer.after_step()
    other = build_quantizer(quantizer.config)
    other.load_state_dict(copy.deepcopy(quantizer.state_dict()))
    z = latents(quantizer, seed=9)
    assert torch.equal(quantizer.eval()(z).indices, other.eval()(z).indices)
    assert torch.equal(quantizer.codebook, other.codebook)


def test_evaluation_changes_nothing(quantizer: Quantizer):
    quantizer.eval()
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(latents(quantizer))
    quantizer.after_step()
    assert all(torch.equal(before[key], value) for key, value in quantizer.state_dict().items())


def test_half_precision_latents_are_quantised_in_full_precision(quantizer: Quantizer):
    quantizer.eval()
    z = latents(quantizer).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantizer(z)
    assert output.quantized.dtype == torch.float32
    assert torch.equal(output.indices, quantizer(z.float()).indices)
