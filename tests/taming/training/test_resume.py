"""From where a run goes on, and whether it may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from stage1_vq.config import VQTrainConfig
from taming.config import save_config
from taming.errors import UserError
from taming.training.resume import check_same_config, choose_checkpoint, run_lock
from tests.conftest import TINY_TRAINING, vq_config
from tests.ranks import run_ranks


@pytest.fixture
def config(tmp_path: Path) -> VQTrainConfig:
    save_config(vq_config(), tmp_path / "config.yaml")
    return vq_config()


def saved(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    return values


def test_keys_that_came_after_a_run_mean_what_was(tmp_path: Path, config: VQTrainConfig) -> None:
    values = saved(tmp_path)
    del values["training"]["verify_processes_every"], values["training"]["clip_norm"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    check_same_config(tmp_path, config)
    other = vq_config(training={**TINY_TRAINING, "clip_norm": 2.0})
    with pytest.raises(UserError, match=r"training\.clip_norm: 1\.0 there, 2\.0 here\)"):
        check_same_config(tmp_path, other)


def test_a_config_of_another_time_is_shown_as_it_is(tmp_path: Path, config: VQTrainConfig) -> None:
    values = saved(tmp_path)
    values["training"]["gone"] = 3
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"training\.gone: 3 there, absent here"):
        check_same_config(tmp_path, config)


def test_what_only_says_when_may_change(tmp_path: Path, config: VQTrainConfig) -> None:
    free = {"steps": 9, "workers": 2, "log_every": 3, "on_nonfinite": "skip", "output": "elsewhere"}
    check_same_config(tmp_path, vq_config(training={**TINY_TRAINING, **free}))
    # `data.cache` is free, and is no part of another key's name.
    changed = vq_config(data={"kind": "scenes", "size": 16, "num_train": 13, "num_validation": 6})
    with pytest.raises(UserError, match=r"data\.num_train: 12 there, 13 here"):
        check_same_config(tmp_path, changed)


def test_many_differences_are_counted(tmp_path: Path, config: VQTrainConfig) -> None:
    values = saved(tmp_path)
    values["optimizer"] |= {"learning_rate": 2.0, "weight_decay": 1.0, "warmup_steps": 7, "final_ratio": 1.0}
    values["training"] |= {
        "seed": 5,
        "batch_size": 8,
        "accumulation": 2,
        "clip_norm": 9.0,
        "precision": "bf16",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="; and 1 more"):
        check_same_config(tmp_path, config)


def try_lock(rank: int, folder: Path) -> str:
    try:
        with run_lock(folder, enabled=True):
            return "taken"
    except UserError as error:
        return str(error)


def test_one_run_a_folder(tmp_path: Path) -> None:
    with run_lock(tmp_path, enabled=True):
        (outcome,) = run_ranks(try_lock, 1, tmp_path)
        assert outcome.result.startswith(f"another process is training in {tmp_path}; wait for it")
    (outcome,) = run_ranks(try_lock, 1, tmp_path)
    assert outcome.result == "taken"


def test_a_checkpoint_may_be_named_from_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run/checkpoints/step-00000002"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder.parent)
    assert choose_checkpoint(tmp_path / "run", "step-00000002", []) == folder
    with pytest.raises(UserError, match="--resume step-3: no such checkpoint folder"):
        choose_checkpoint(tmp_path / "run", "step-3", [])
