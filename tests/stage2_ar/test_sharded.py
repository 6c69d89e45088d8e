"""Sharded weights train as whole ones do, and leave nothing behind that tells of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from stage1_vq import VQModel
from stage1_vq.config import VQModelConfig
from stage2_ar import ARPipeline
from stage2_ar.conditions.base import take_rows
from stage2_ar.config import ARTrainConfig
from stage2_ar.task import ARTask
from taming.config import build_config
from taming.errors import UserError
from taming.training.checkpoint import load_checkpoint, save_checkpoint
from taming.training.distributed import make_accelerator
from taming.training.sharded import is_sharded, shard, state_in_parts
from taming.training.sharding import Sharding
from taming.types import Batch
from tests.conftest import TINY_MODEL, TINY_TRAINING, ar_config, ar_values
from tests.ranks import run_ranks

STEPS, SAVED = 5, 3
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
SIZE = (8, 8)
ROOT = Path(__file__).parents[2]
FSDP_CONFIG = "configs/accelerate/fsdp.yaml"


def config(**changes: Any) -> ARTrainConfig:
    training = {"steps": STEPS, "batch_size": 8, "accumulation": 2, "clip_norm": 0.1, "ema_decay": 0.9}
    values: dict[str, Any] = {
        "transformer": {"kind": "llama", "num_layers": 2, "num_heads": 2, "width": 16},
        "condition": {"kind": "class", "num_classes": 5, "dropout": 0.2},
        "training": {**TINY_TRAINING, **training, "preview_every": 2},
    }
    return ar_config(**{**values, **changes})


def optimizer(method: str) -> dict[str, Any]:
    return {"learning_rate": 1e-3, "method": method, "weight_decay": 0.1}


def prepared(accelerator: Accelerator, settings: ARTrainConfig) -> ARTask:
    torch.manual_seed(0)
    tokenizer = VQModel(build_config(VQModelConfig, TINY_MODEL)).eval()
    task = ARTask(settings, tokenizer, SIZE)
    task.prepare(accelerator, STEPS)
    return task


def batch(step: int) -> Batch:
    random = torch.Generator().manual_seed(step)
    return {
        "codes": torch.randint(0, 16, (8, 4, 4), generator=random),
        "label": torch.randint(0, 5, (8,), generator=random),
        "key": [f"{step}/{number}" for number in range(8)],
    }


def steps(accelerator: Accelerator, task: ARTask, first: int, last: int) -> list[float]:
    rank, processes = accelerator.process_index, accelerator.num_processes
    losses = []
    for step in range(first, last):
        rows = [part[rank::processes] for part in torch.arange(8).chunk(2)]
        losses.append(task.train_step([take_rows(batch(step), own) for own in rows], step)["loss"].item())
    return losses


def figures(accelerator: Accelerator, task: ARTask) -> dict[str, float]:
    # Not as many batches on each process: 5 samples on one, 3 on the other.
    rows = torch.arange(8).split(8 if accelerator.num_processes == 1 else 5)[accelerator.process_index]
    return task.evaluate(take_rows(batch(9), own) for own in rows.split(2))


def train(accelerator: Accelerator, folder: Path, task: ARTask, saved: bool = False) -> dict[str, Any]:
    """Losses, with a checkpoint after some steps and another at the end, or from the first of these on."""

    def save(step: int) -> None:
        save_checkpoint(accelerator, folder, step, task.modules(), task.optimizers(), {}, keep=9)

    if saved:
        load_checkpoint(accelerator, folder / f"step-{SAVED:08d}", task.modules(), task.optimizers())
        losses = []
    else:
        losses = steps(accelerator, task, 0, SAVED)
        save(SAVED)
    losses += steps(accelerator, task, SAVED, STEPS)
    found = figures(accelerator, task)
    save(STEPS)
    if accelerator.is_main_process:
        task.preview(take_rows(batch(9), torch.arange(2)))
        task.save_model(folder / "model")
    return {"losses": losses, "figures": found}


def sharded_run(rank: int, folder: Path, whole: Path, method: str) -> dict[str, Any]:
    os.environ |= SHARDED
    accelerator, settings = make_accelerator("fp32"), config(optimizer=optimizer(method))
    task = prepared(accelerator, settings)
    assert is_sharded(task.model)
    told = train(accelerator, folder / "through", task)
    own = [state_in_parts(module) for module in (task.model, task.ema.module)]
    moments = [entry["exp_avg"] for entry in task.optimizers()["model"].state.values()]
    told["share"] = [
        sum(value.to_local().numel() for value in values) / sum(value.numel() for value in values)
        for values in (list(own[0].values()), list(own[1].values()), moments)
    ]
    # Anew from what was saved: by sharded processes, and by a single whole one.
    (folder / "again").mkdir(exist_ok=True)
    for source, target in ((folder / "through", "again"), (whole, "from_whole")):
        place = folder / target
        if rank == 0:
            place.mkdir(exist_ok=True)
            (place / f"step-{SAVED:08d}").symlink_to(source / f"step-{SAVED:08d}")
        accelerator.wait_for_everyone()
        told[target] = train(accelerator, place, prepared(accelerator, settings), saved=True)
    told["bf16"] = half_precision(accelerator)
    return told


def half_precision(accelerator: Accelerator) -> dict[str, Any]:
    """The types of a block's weights while it computes, of what is kept of them, and of their gradients."""
    torch.manual_seed(0)
    block, head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)
    model = torch.nn.Sequential(block, head)
    seen: dict[str, Any] = {}
    block.register_forward_hook(lambda module, inputs, out: seen.update(used=module.weight.dtype))
    shard(model, [block], Sharding(), accelerator.device, block_dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.ones(2, 4)).sum().backward()
    return {**seen, "kept": block.weight.dtype, "gradient": block.weight.grad.dtype}


def largest_difference(one: Path, other: Path) -> float:
    differences = [0.0]
    for name in ("modules", "optimizers"):
        first, second = (load_file(path / f"{name}.safetensors") for path in (one, other))
        assert first.keys() == second.keys()
        for key, value in first.items():
            if value.numel():
                differences.append((value.double() - second[key].double()).abs().nan_to_num().max().item())
    return max(differences)


# Muon finds its orthogonal matrices in bf16, where the last bits of a gradient matter.
@pytest.mark.parametrize(
    ("method", "close"), [("adam", 1e-6), pytest.param("muon", 1e-4, marks=pytest.mark.slow)]
)
def test_two_processes_with_parts_train_as_one_with_all(tmp_path: Path, method: str, close: float) -> None:
    accelerator, settings = make_accelerator("fp32"), config(optimizer=optimizer(method))
    whole = train(accelerator, tmp_path / "whole", prepared(accelerator, settings))
    outcomes = run_ranks(sharded_run, 2, tmp_path, tmp_path / "whole", method, timeout=120)
    assert [outcome.error for outcome in outcomes] == [None, None]
    first, second = (outcome.result for outcome in outcomes)
    last = f"step-{STEPS:08d}"

    assert first["losses"] == second["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert first["figures"] == second["figures"] == pytest.approx(whole["figures"], rel=1e-5)
    assert largest_difference(tmp_path / "whole" / last, tmp_path / "through" / last) < close
    for shares in zip(first["share"], second["share"], strict=True):
        assert sum(shares) == pytest.approx(1)
        assert max(shares) < 0.55

    assert first["again"]["losses"] == first["losses"][SAVED:]
    for name in ("modules", "optimizers", "random-0", "random-1"):
        one, other = (tmp_path / run / last / f"{name}.safetensors" for run in ("through", "again"))
        assert one.read_bytes() == other.read_bytes(), name
    assert first["from_whole"]["losses"] == pytest.approx(whole["losses"][SAVED:], rel=1e-5)

    # What is saved is the averaged model, as a single process would have saved it; and that one goes on.
    pipe = ARPipeline.from_pretrained(tmp_path / "through" / "model")
    saved: dict[str, Tensor] = load_file(tmp_path / "through" / last / "modules.safetensors")
    for key, value in pipe.model.state_dict().items():
        assert torch.equal(value, saved[f"ema/module.{key}"]), key
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / f"step-{SAVED:08d}").symlink_to(tmp_path / "through" / f"step-{SAVED:08d}")
    alone = train(accelerator, tmp_path / "alone", prepared(accelerator, settings), saved=True)
    assert alone["losses"] == pytest.approx(whole["losses"][SAVED:], rel=1e-5)

    assert first["bf16"] == {"used": torch.bfloat16, "kept": torch.float32, "gradient": torch.float32}


VARIANTS: dict[str, dict[str, Any]] = {
    "gpt": {"transformer": {"kind": "gpt", "num_layers": 2, "num_heads": 2, "width": 16}},
    "without_average": {"training": {**TINY_TRAINING, "batch_size": 8, "steps": STEPS, "ema_decay": None}},
    "recompute": {"recompute": True},
    "random_order": {
        "transformer": {
            "kind": "llama",
            "num_layers": 2,
            "num_heads": 2,
            "width": 16,
            "target_positions": True,
        },
        "random_order": {"start": 0.5},
    },
    "none_shared": {"condition": {"kind": "none", "start_token": 2}},
    "class_shared": {"condition": {"kind": "class", "num_classes": 5, "shared_vocabulary": True}},
    "best": {"keep": "best"},
    "muon": {"optimizer": {"learning_rate": 1e-3, "method": "muon", "weight_decay": 0.1}},
}


COMPILED = {"compiled": {"compile": True, "recompute": True}}


def variants(
    rank: int, folder: Path, environment: dict[str, str], configs: dict[str, Any]
) -> dict[str, list[float]]:
    os.environ |= environment
    accelerator, told = make_accelerator("fp32"), {}
    for name, changes in configs.items():
        task = prepared(accelerator, config(**changes))
        told[name] = [*steps(accelerator, task, 0, STEPS), figures(accelerator, task)["loss"]]
        save_checkpoint(accelerator, folder / name, STEPS, task.modules(), task.optimizers(), {})
        if rank == 0:
            task.preview(take_rows(batch(9), torch.arange(2)))
            task.save_model(folder / name / "model")
    return told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wishes", "configs"),
    [
        ({}, VARIANTS),
        ({"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, VARIANTS),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, VARIANTS),
        ({}, COMPILED),
    ],
    ids=["by_block", "no_wrap", "kept", "compiled"],
)
def test_every_kind_of_training_is_sharded(
    tmp_path: Path, wishes: dict[str, str], configs: dict[str, Any]
) -> None:
    plain = {name: {**changes, "compile": False} for name, changes in configs.items()}
    alone = variants(0, tmp_path / "alone", {}, plain)
    outcomes = run_ranks(variants, 2, tmp_path / "both", {**SHARDED, **wishes}, configs, timeout=300)
    assert [outcome.error for outcome in outcomes] == [None, None]
    for name, losses in alone.items():
        assert outcomes[0].result[name] == pytest.approx(losses, rel=1e-5), name
        assert outcomes[1].result[name] == outcomes[0].result[name]
        for model in ("alone", "both"):
            ARPipeline.from_pretrained(tmp_path / model / name / "model")


def held(rank: int, folder: Path) -> None:
    """The condition alone is trained, from a saved pipeline; the transformer stays as it is, bit for bit."""
    os.environ |= SHARDED
    accelerator = make_accelerator("fp32")
    task = prepared(accelerator, config(init_from=str(folder), train_only="condition"))
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    steps(accelerator, task, 0, STEPS)
    for name, value in task.model.state_dict().items():
        if rank == 0:
            assert torch.equal(value, before[name]) == name.startswith("transformer"), name


@pytest.mark.slow
def test_the_condition_alone_is_sharded_too(tmp_path: Path) -> None:
    task = prepared(make_accelerator("fp32"), config())
    task.save_model(tmp_path / "start")
    outcomes = run_ranks(held, 2, tmp_path / "start", timeout=120)
    assert [outcome.error for outcome in outcomes] == [None, None]


def broken(rank: int, folder: Path) -> tuple[str, bool]:
    """A NaN in one process's part of a weight."""
    os.environ |= SHARDED
    accelerator = make_accelerator("fp32")
    task = prepared(accelerator, config())
    steps(accelerator, task, 0, 1)
    if rank == 1:
        with torch.no_grad():
            task.model.transformer.head.weight.to_local()[0, 0] = torch.nan
    before = task.model.transformer.token_embedding.weight.to_local().clone()
    try:
        steps(accelerator, task, 1, 2)
    except UserError as error:
        return str(error), torch.equal(before, task.model.transformer.token_embedding.weight.to_local())
    return "", False


@pytest.mark.slow
def test_what_is_not_finite_in_one_part_stops_all(tmp_path: Path) -> None:
    outcomes = run_ranks(broken, 2, tmp_path, timeout=120)
    for outcome in outcomes:
        assert outcome.error is None
        text, same = outcome.result
        assert "not finite" in text
        assert same


def launched(folder: Path, start: list[str], precision: str = "fp32") -> list[float]:
    """Losses of a run of the command line, started so."""
    folder.mkdir()
    torch.manual_seed(0)
    VQModel(build_config(VQModelConfig, TINY_MODEL)).save_pretrained(folder / "tokenizer")
    values = ar_values(tokenizer=str(folder / "tokenizer"), keep="best")
    values["transformer"] = {"kind": "llama", "num_layers": 2, "num_heads": 2, "width": 16}
    values["training"] = {**TINY_TRAINING, "steps": 6, "keep_checkpoints": 9, "precision": precision}
    (folder / "ar.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", *start, "ar", "train", str(folder / "ar.yaml")]
    done = subprocess.run(
        [*command, "-o", f"training.output={folder / 'run'}"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 9  # six of steps, three of evaluations
    return losses


@pytest.mark.slow
def test_the_shipped_config_of_accelerate_trains(tmp_path: Path) -> None:
    """Through its launcher on two processes; without GPUs they use the CPU."""
    alone = launched(tmp_path / "alone", ["taming"])
    accelerate = ["accelerate.commands.launch", "--config_file", str(ROOT / FSDP_CONFIG), "-m", "taming"]
    assert launched(tmp_path / "both", accelerate) == pytest.approx(alone, rel=1e-5)
    assert len(list((tmp_path / "both/run/checkpoints/step-00000006").glob("random-*"))) == 2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("precision", "close"), [("fp32", 1e-4), ("bf16", 1e-2)])
def test_two_gpus_train_as_one(tmp_path: Path, precision: str, close: float) -> None:
    alone = launched(tmp_path / "alone", ["taming"], precision)
    both = launched(tmp_path / "both", ["taming.launcher", "--fsdp", "2"], precision)
    assert both == pytest.approx(alone, rel=close)
