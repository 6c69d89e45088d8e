"""Which optimiser moves which weight of stage one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stage1_vq.config import VQOptimizerConfig, VQTrainConfig
from stage1_vq.model import VQModel
from stage1_vq.optimizers import autoencoder_optimizers
from stage1_vq.train import train
from taming.config import build_config
from tests.conftest import vq_values


@pytest.mark.parametrize("method", ["adam", "muon"])
def test_one_step_moves_every_weight_once(method: str) -> None:
    torch.manual_seed(0)
    model = VQModel(build_config(VQTrainConfig, vq_values()).model)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizers = autoencoder_optimizers(model, VQOptimizerConfig(learning_rate=1e-2, method=method))
    output = model(torch.rand(2, 3, 16, 16) * 2 - 1)
    (output.reconstruction.square().mean() + output.quantizer.loss).backward()
    for optimizer in optimizers.values():
        optimizer.step()
    # Adam moves each number by about the rate, Muon by about a fifth of it: twice would show.
    for name, weight in model.named_parameters():
        moved = (weight - before[name]).square().mean().sqrt()
        assert 1e-4 < moved < 1.1e-2, name
    hidden = {"adam": 0, "muon": 26}[method]
    assert sum(len(g["params"]) for g in optimizers.get("model_hidden", _Nothing).param_groups) == hidden
    for optimizer in optimizers.values():
        optimizer.zero_grad()
    assert all(weight.grad is None for weight in model.parameters())


class _Nothing:
    param_groups: tuple[()] = ()


def test_a_run_with_muon_resumes_exactly(tmp_path: Path) -> None:
    values = vq_values(optimizer={"learning_rate": 1e-3, "method": "muon"})
    whole = train(build_config(VQTrainConfig, values), tmp_path / "whole")
    half = {**values, "training": {**values["training"], "steps": 2}}
    train(build_config(VQTrainConfig, half), tmp_path / "halved")
    rest = train(build_config(VQTrainConfig, values), tmp_path / "halved")
    assert (
        VQModel.from_pretrained(whole.model).content_hash()
        == VQModel.from_pretrained(rest.model).content_hash()
    )
