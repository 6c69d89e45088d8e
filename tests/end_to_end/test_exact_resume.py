"""Every kind of run goes on exactly: one a quantizer, and one for each option that draws or remembers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from stage1_vq import VQModel
from stage1_vq.train import train as train_tokenizer
from stage2_ar.train import train as train_transformer
from taming.training import loop
from tests.conftest import TINY_MODEL, TINY_TRAINING, ar_config, vq_config, vq_values
from tests.end_to_end.killing import differences, what_is_left
from tests.end_to_end.test_command_line import ENVIRONMENT

TRAINING = {
    **TINY_TRAINING, "steps": 8, "checkpoint_every": 3, "log_every": 2, "evaluate_every": 4,
    "preview_every": 8,
}  # fmt: skip
TABLE: dict[str, Any] = {"codebook_size": 16, "code_dim": 4}
PATCHGAN = {"kind": "patchgan", "channels": 4, "num_layers": 1}
QUANTIZERS: dict[str, dict[str, Any]] = {
    "nearest": {"kind": "nearest", **TABLE, "kmeans_init": True, "revive_after": 2},
    "k-means waits": {"kind": "nearest", **TABLE, "codebook_size": 512, "kmeans_init": True},
    "ema": {"kind": "ema", **TABLE, "revive_after": 1, "revive_below": 0.3, "l2_normalised": True},
    "gumbel": {"kind": "gumbel", **TABLE},
    "fsq": {"kind": "fsq", "levels": [3, 3, 3]},
    "lfq": {"kind": "lfq", "num_bits": 4},
    "bsq": {"kind": "bsq", "num_bits": 4},
    "ibq": {"kind": "ibq", **TABLE},
    "simvq": {"kind": "simvq", **TABLE},
    "residual": {
        "kind": "residual", "num_stages": 2, "codes_per_stage": 4, "code_dim": 4, "kmeans_init": True,
        "revive_after": 1,
    },
}  # fmt: skip
STAGE_ONE: dict[str, dict[str, Any]] = {
    name: {"model": {**TINY_MODEL, "quantizer": quantizer}} for name, quantizer in QUANTIZERS.items()
} | {
    "stylegan": {"discriminator": {"network": {"kind": "stylegan", "channels": 4}}},
    "r1": {"discriminator": {"network": PATCHGAN, "r1": {"interval": 2}, "augment": ["color", "cutout"]}},
    "ramp": {"discriminator": {"network": PATCHGAN, "warmup_steps": 2, "ramp_steps": 3, "lecam": {}}},
    "bf16": {"training": {**TRAINING, "precision": "bf16"}},
    "no average": {"training": {**TRAINING, "ema_decay": None}},
    "schedule": {"optimizer": {"learning_rate": 1e-3, "warmup_steps": 4, "schedule": "cosine"}},
    "crops": {
        "data": {
            "kind": "scenes", "size": 16, "num_train": 13, "num_validation": 6, "crop_from": 24, "flip": True,
        }
    },
}  # fmt: skip
LLAMA = {"kind": "llama", "num_layers": 1, "num_heads": 2, "width": 16}
STAGE_TWO: dict[str, dict[str, Any]] = {
    "dropout": {
        "transformer": {
            **LLAMA, "kind": "gpt", "residual_dropout": 0.1, "embedding_dropout": 0.1,
            "attention_dropout": 0.1,
        }
    },
    "random order": {
        "transformer": {**LLAMA, "target_positions": True}, "random_order": {"start": 0.2, "end": 0.8},
    },
    "class, dropped": {"condition": {"kind": "class", "num_classes": 7, "dropout": 0.3}},
    "smoothing": {"label_smoothing": 0.1, "pkeep": 0.7, "recompute": True},
    "best": {"keep": "best", "optimizer": {"learning_rate": 1e-2, "method": "muon"}},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGE_ONE)
def test_stage_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = vq_config(**{"training": TRAINING, **STAGE_ONE[name]})
    stop_in_step_five(monkeypatch, lambda run: train_tokenizer(config, run), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGE_TWO)
def test_stage_two(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: VQModel) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = ar_config(tokenizer=str(tmp_path / "tokenizer"), training=TRAINING, **STAGE_TWO[name])
    stop_in_step_five(monkeypatch, lambda run: train_transformer(config, run), tmp_path)


def stop_in_step_five(monkeypatch: pytest.MonkeyPatch, train: Any, folder: Path) -> None:
    """Train once as a whole, and once with an end in step 5, of which nothing is saved, and again."""
    train(folder / "whole")
    real, calls = loop._Sums.add, []

    def end(self: loop._Sums, values: dict[str, Tensor]) -> None:
        calls.append(values)
        if len(calls) == 5:
            raise KeyboardInterrupt
        real(self, values)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Sums, "add", end)
        with pytest.raises(KeyboardInterrupt):
            train(folder / "stopped")
    train(folder / "stopped")
    assert not differences(what_is_left(folder / "whole"), what_is_left(folder / "stopped"))


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_pictures_and_says_so(tmp_path: Path) -> None:
    config, run = tmp_path / "vq.yaml", tmp_path / "run"
    training = {**TRAINING, "log_every": 1}
    config.write_text(yaml.safe_dump(vq_values(training=training)))
    command = ["-m", "taming", "vq", "train", str(config), "-o", f"training.output={run}"]
    launchers = {
        1: [sys.executable],
        2: [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"],
    }
    for processes, steps in ((2, 3), (1, 6), (2, 8)):
        done = subprocess.run(
            [*launchers[processes], *command, "-o", f"training.steps={steps}"],
            env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        if steps > 3:
            assert f"saved by {3 - processes} process(es) and goes on with {processes}" in done.stderr
    train_tokenizer(vq_config(training=training), tmp_path / "whole")
    wanted, found = (
        {record["step"]: record for record in what_is_left(folder)["log"] if record["kind"] == "train"}
        for folder in (tmp_path / "whole", run)
    )
    # Nothing here draws after the start: the same but for the order of sums.
    assert list(wanted) == list(found) == list(range(1, 9))
    for step, record in wanted.items():
        assert found[step]["rec"] == pytest.approx(record["rec"], rel=1e-3)
