"""Each GAN system, as small as it is shipped: in a minute its pictures come nearer to real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from taming.config import load_config
from taming.data.dataset import open_dataset
from taming.gan import GANModel
from taming.gan.config import GANTrainConfig
from taming.gan.task import model_config
from taming.gan.train import train
from taming.metrics.feature_distance import feature_distance
from taming.metrics.sliced_wasserstein import SlicedWasserstein

STEPS, PICTURES = 400, 256
QUICKLY = [
    f"training.steps={STEPS}",
    "training.ema_decay=0.98",
    "training.evaluate_every=1000",
    "training.preview_every=1000",
    "training.evaluation_pictures=16",
    f"data.num_validation={PICTURES}",
]


@pytest.mark.slow
@pytest.mark.parametrize("system", ["sagan", "transgan", "vitgan", "stransgan"])
def test_a_minute_brings_pictures_nearer_to_real_ones(system: str, tmp_path: Path):
    torch.manual_seed(0)
    config = load_config(GANTrainConfig, f"{system}_small", QUICKLY, group="gan")
    data = open_dataset(config.data, "validation")
    real = data.batch(range(PICTURES), [-1] * PICTURES)["image"].float() / 127.5 - 1
    untrained = GANModel(model_config(config, data.class_names)).eval()
    trained = GANModel.from_pretrained(train(config, tmp_path / "run").model)
    before, after = (model.sample(PICTURES, seed=1) for model in (untrained, trained))
    assert feature_distance(real, after) < feature_distance(real, before) / 2
    assert patch_distance(real, after) < patch_distance(real, before)


def patch_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    distance = SlicedWasserstein((32, 32))
    distance.add_real(real)
    distance.add_generated(generated)
    return distance.value()["mean"]
