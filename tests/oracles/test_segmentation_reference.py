"""The tokenizer of label maps against the published modules' own results (../shared/reference)."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from stage1_vq.config import LossConfig
from stage1_vq.inputs import one_hot
from stage1_vq.loss import reconstruction_loss
from tests.reference_checkpoint import import_reference


def test_published_label_model_gives_its_own_codes_logits_and_loss() -> None:
    result, io = import_reference("segmentation_vqgan")
    model = result.model
    config = model.config
    assert (config.input, config.in_channels) == ("segmentation", 12)
    # The published state holds a colour table for its own previews.
    assert list(result.left_out.values()) == [("colorize",)]
    labels = io["labels"]
    assert torch.equal(model.encode(labels), io["codes"])
    maps = one_hot(labels, config.in_channels)
    with torch.no_grad():
        output = model(maps)
    assert_close(output.reconstruction, io["logits"], rtol=0, atol=1e-4)
    assert_close(model.decode(io["codes"]), io["logits"], rtol=0, atol=1e-4)
    settings = LossConfig(reconstruction="bce", perceptual_weight=0)
    bce = reconstruction_loss(output.reconstruction, maps, settings, None).total
    assert_close(bce + output.quantizer.loss, io["loss_legacy"], rtol=1e-3, atol=0)
