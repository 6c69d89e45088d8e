"""The shipped configs of layouts and captions build, small, on what `taming data scenes` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stage1_vq import VQModel
from stage2_ar.config import ARTrainConfig
from stage2_ar.model import ARModel
from stage2_ar.task import model_config
from stage2_ar.train import check, filled_in
from taming.config import load_config
from taming.data.config import FolderDataConfig
from taming.data.dataset import open_dataset
from taming.data.export import write_scenes


@pytest.mark.parametrize("name", ["layout_64", "text_64"])
def test_shipped_configs_train_on_files(name: str, tokenizer: VQModel, tmp_path: Path) -> None:
    list(write_scenes(tmp_path, 4))
    overrides = [f"data.root={tmp_path}", "tokenizer=anything", "data.validation_fraction=0.25"]
    config = load_config(ARTrainConfig, name, overrides, group="stage2")
    assert isinstance(config.data, FolderDataConfig)
    data = open_dataset(config.data, "train")
    config = filled_in(config, lambda: data)
    check(config, tokenizer, data)
    with torch.device("meta"):
        model = ARModel(model_config(config, tokenizer, data.size))
    condition = model.condition
    batch = data.batch([0, 1], [0, 0])
    condition.check(batch, model.config.grid)
    assert condition.has_null
    assert condition.prefix_length(model.config.grid) in (31, 33)
