"""Stage two on several processes and micro-batches trains as one process does on the whole batch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from stage1_vq import VQModel
from stage2_ar.config import ARTrainConfig
from stage2_ar.task import ARTask
from stage2_ar.train import train
from taming.config import build_config
from taming.errors import UserError
from tests.conftest import TINY_TRAINING, ar_values
from tests.ranks import run_ranks
from tests.stage1_vq.test_processes import digests


def settings(tokenizer: Path, steps: int, **training: Any) -> ARTrainConfig:
    """Conditions are left out and inputs disturbed at random, some pictures written in random order."""
    values = ar_values(
        tokenizer=str(tokenizer),
        data={"kind": "scenes", "size": 16, "num_train": 24, "num_validation": 7},
        pkeep=0.9,
        random_order={"final_share": 0.5},
        training=TINY_TRAINING
        | dict.fromkeys(("evaluate_every", "checkpoint_every", "preview_every"), 1000)
        | {"steps": steps, "batch_size": 8, "verify_processes_every": 1, **training},
    )
    values["condition"] |= {"dropout": 0.5}
    values["transformer"] |= {"target_positions": True}
    return build_config(ARTrainConfig, values)


def watched_run(
    rank: int, config: ARTrainConfig, folder: Path, poisoned: int | None = None
) -> dict[str, Any]:
    """A real run, and what each of its steps saw and left; the second one meets infinity on `poisoned`."""
    seen: dict[str, Any] = {"keys": [], "logs": [], "digests": [], "error": None}
    real = ARTask.train_step

    def watched(task: ARTask, batches: list[dict[str, Any]], step: int) -> dict[str, Tensor]:
        weight, end = task.model.transformer.head.weight, lambda: None
        if step == 1 and rank == poisoned:
            end = weight.register_hook(lambda gradient: gradient * float("inf")).remove
        try:
            logs = real(task, batches, step)
        finally:
            end()
            seen["digests"].append(digests(task))
        seen["keys"].append([key for batch in batches for key in batch["key"]])
        seen["logs"].append({name: float(value) for name, value in logs.items()})
        return logs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ARTask, "train_step", watched)
        try:
            seen["result"] = train(config, folder)
        except UserError as error:
            seen["error"] = str(error)
    return seen


def check_one_run(config: ARTrainConfig, folder: Path) -> None:
    ranks = run_ranks(watched_run, 2, config, folder / "two", timeout=300)
    assert [rank.error for rank in ranks] == [None, None]
    first, second = (rank.result for rank in ranks)
    alone = watched_run(0, config, folder / "one")
    assert alone["keys"] == [a + b for a, b in zip(first["keys"], second["keys"], strict=True)]
    assert first["logs"] == second["logs"]
    assert first["digests"] == second["digests"]
    assert len(alone["logs"]) == config.training.steps
    for step, (found, wanted) in enumerate(zip(first["logs"], alone["logs"], strict=True)):
        assert found == pytest.approx(wanted, rel=1e-5), step
    assert first["result"].figures == second["result"].figures
    assert first["result"].figures == pytest.approx(alone["result"].figures, rel=1e-5)


def test_two_processes_are_one(tmp_path: Path, tokenizer: VQModel):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    check_one_run(settings(tmp_path / "tokenizer", 3), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_are_one_for_twenty_steps(tmp_path: Path, tokenizer: VQModel, accumulation: int):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    check_one_run(settings(tmp_path / "tokenizer", 20, accumulation=accumulation), tmp_path)


@pytest.mark.slow
def test_micro_batches_are_one_batch(tmp_path: Path, tokenizer: VQModel):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    runs = [
        watched_run(0, settings(tmp_path / "tokenizer", 5, accumulation=n), tmp_path / str(n)) for n in (1, 2)
    ]
    assert runs[0]["keys"] == runs[1]["keys"]
    for found, wanted in zip(runs[1]["logs"], runs[0]["logs"], strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)


NAMED = r"the gradient of the model \(process 1 of 2\) is not finite"


@pytest.mark.slow
def test_a_gradient_that_is_infinite_on_one_process_stops_all(tmp_path: Path, tokenizer: VQModel):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = settings(tmp_path / "tokenizer", 3)
    first, second = (rank.result for rank in run_ranks(watched_run, 2, config, tmp_path / "run", 1))
    assert first["error"] == second["error"]
    assert re.search(f"diverged at step 1: {NAMED}; nothing was changed", first["error"])
    assert first["digests"] == second["digests"]
    assert first["digests"][0] == first["digests"][1]


def test_a_step_that_is_infinite_on_one_process_is_left_out_by_all(tmp_path: Path, tokenizer: VQModel):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = settings(tmp_path / "tokenizer", 3, on_nonfinite="skip")
    first, second = (rank.result for rank in run_ranks(watched_run, 2, config, tmp_path / "run", 1))
    assert first["error"] is None
    assert first["digests"] == second["digests"]
    changed = [name for name, value in first["digests"][1].items() if value != first["digests"][0][name]]
    assert changed == ["nonfinite/_extra_state"]
    assert first["logs"][1] == {}
    assert re.search(f"step 2: a step was left out, the 1st of the run: {NAMED}", first["result"].notes[0])
