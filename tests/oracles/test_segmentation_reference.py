"""The tokenizer of label maps against the published modules' own results (../shared/reference)."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from stage1_vq.config import LossConfig
from stage1_vq.inputs import one_hot
from stage1_vq.loss import reconstruction_loss
from stage1_vq.model import VQModel
from tests.oracles.test_stage1_reference import model_config
from tests.reference_checkpoint import load_reference


def test_published_label_model_gives_its_own_codes_logits_and_loss() -> None:
    published, state, io = load_reference("segmentation_vqgan")
    params = published["model"]["params"]
    config = model_config(params).model_copy(update={"input": "segmentation"})
    assert config.in_channels == params["n_labels"]
    model = VQModel(config)
    # The published state holds a colour table for its own previews.
    model.load_state_dict({key: value for key, value in state.items() if key != "colorize"})
    model.eval()
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
