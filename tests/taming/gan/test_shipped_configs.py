"""Every shipped config of a GAN can be read, and says what it amounts to."""

from __future__ import annotations

from pathlib import Path

import pytest

from taming.config import load_config, read_yaml, shipped_configs
from taming.data.scenes import CLASS_NAMES
from taming.gan.config import GANTrainConfig
from taming.gan.task import model_config

CONFIGS = shipped_configs("gan")


def load(path: Path) -> GANTrainConfig:
    rest = [] if read_yaml(path)["data"]["kind"] == "scenes" else ["data.root=pictures"]
    return load_config(GANTrainConfig, path, rest)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_can_be_read(name: str):
    config = load(CONFIGS[name])
    assert config.description
    assert model_config(config, CLASS_NAMES).size == config.data.height_width


def test_there_is_one_for_each_system_and_size():
    systems = ("sagan", "transgan", "vitgan", "stransgan")
    assert {f"{name}_{size}" for name in systems for size in (32, 64, 128, 256, "small")} <= CONFIGS.keys()
