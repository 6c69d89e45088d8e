"""Several processes, or micro-batches, train as one process does on the whole batch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stage1_vq.config import VQTrainConfig
from stage1_vq.quantizers import health
from stage1_vq.task import VQTask
from stage1_vq.train import train
from taming.config import build_config
from taming.data.batch import to_device
from taming.data.config import ScenesDataConfig
from taming.data.loader import train_batches
from taming.data.source import open_splits
from taming.errors import UserError
from taming.training.checkpoint import list_checkpoints
from taming.training.distributed import make_accelerator
from taming.training.drift import verify_processes
from tests.conftest import TINY_MODEL, TINY_TRAINING, vq_values
from tests.ranks import run_ranks

LOSSES = ("nll", "rec", "codebook", "commitment", "adversarial", "discriminator", "r1", "adaptive_weight")
PUBLISHED_RATE = 8 * 4.5e-6
"""For a batch of 8."""


def settings(kind: str, steps: int, **changes: Any) -> VQTrainConfig:
    """All at once: adversarial term, penalty, LeCam, augmentation, k-means, revival, an average."""
    quantizer = {"kind": kind, "codebook_size": 24, "code_dim": 4, "kmeans_init": True, "revive_after": 2}
    training = {
        **TINY_TRAINING, "steps": steps, "batch_size": 8, "evaluate_every": 1000, "checkpoint_every": 1000,
        "preview_every": 1000, "ema_decay": 0.9, "verify_processes_every": 1,
    }  # fmt: skip
    values = vq_values(
        data={"kind": "scenes", "size": 16, "num_train": 24, "num_validation": 7},
        model=TINY_MODEL | {"quantizer": quantizer},
        discriminator={
            "network": {"kind": "patchgan", "channels": 8, "num_layers": 1} | changes.pop("network", {}),
            "r1": {"interval": 3},
            "lecam": {"weight": 0.1},
            "augment": ["color", "translation"],
        },
        optimizer={"learning_rate": changes.pop("rate", PUBLISHED_RATE)},
        training=training | changes.pop("training", {}),
    )
    assert not changes
    return build_config(VQTrainConfig, values)


def watched_run(rank: int, config: VQTrainConfig, folder: Path) -> dict[str, Any]:
    """A real run, and what each of its steps saw and left."""
    seen: dict[str, Any] = {"keys": [], "logs": [], "digests": [], "revived": 0}
    real, choose = VQTask.train_step, health.choose_rows

    def choosing(rows: Tensor, picks: Tensor) -> Tensor:
        seen["revived"] += len(picks)
        return choose(rows, picks)

    def watched(task: VQTask, batches: list[dict[str, Any]], step: int) -> dict[str, Tensor]:
        logs = real(task, batches, step)
        seen["keys"].append([key for batch in batches for key in batch["key"]])
        seen["logs"].append({name: float(value) for name, value in logs.items()})
        seen["digests"].append(digests(task))
        return logs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VQTask, "train_step", watched)
        patch.setattr(health, "choose_rows", choosing)
        seen["figures"] = train(config, folder).figures
    return seen


def digests(task: VQTask) -> dict[str, str]:
    """sha256 of every weight, buffer and moment."""
    state = {f"{name}/{k}": v for name, m in task.modules().items() for k, v in m.state_dict().items()}
    for name, optimizer in task.optimizers().items():
        for index, entries in optimizer.state_dict()["state"].items():
            state |= {f"{name}/{index}/{key}": value for key, value in entries.items()}
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in state.items()}


def check_one_run(
    config: VQTrainConfig, folder: Path, *, accumulation: int = 1, figures_within: float = 1e-5
) -> None:
    """The bars of several processes: the same pictures, losses, weights and figures as one process.

    The processes cut their share into `accumulation` micro-batches, the one process does not.
    """
    whole = config
    config = config.model_copy(
        update={"training": config.training.model_copy(update={"accumulation": accumulation})}
    )
    ranks = run_ranks(watched_run, 2, config, folder / "two", timeout=300)
    assert [rank.error for rank in ranks] == [None, None]
    first, second = (rank.result for rank in ranks)
    alone = watched_run(0, whole, folder / "one")
    assert alone["keys"] == [a + b for a, b in zip(first["keys"], second["keys"], strict=True)]
    assert first["logs"] == second["logs"]  # to the last bit, the adaptive weight too
    assert first["digests"] == second["digests"]
    assert first["figures"] == second["figures"]
    for step, (found, wanted) in enumerate(zip(first["logs"], alone["logs"], strict=True)):
        assert found.keys() == wanted.keys()
        for name in wanted.keys() & set(LOSSES):
            assert found[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-7), (step, name)
        for name in ("code_usage", "perplexity"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-6), (step, name)
    for name, value in alone["figures"].items():
        assert first["figures"][name] == pytest.approx(value, rel=figures_within, abs=1e-6), name


def test_two_processes_are_one(tmp_path: Path):
    check_one_run(settings("ema", 3), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ema", "nearest"])
def test_two_processes_are_one_for_twenty_steps(tmp_path: Path, kind: str):
    check_one_run(settings(kind, 20), tmp_path)


@pytest.mark.slow
def test_two_processes_with_micro_batches_are_one_without(tmp_path: Path):
    check_one_run(settings("nearest", 10, network={"norm": "spectral"}), tmp_path, accumulation=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "norm", "accumulation"),
    [("ema", "batch", 1), ("nearest", "spectral", 2), ("simvq", "actnorm", 1), ("ibq", "group", 2)],
)
def test_processes_stay_equal_for_fifty_steps(tmp_path: Path, kind: str, norm: str, accumulation: int):
    """Revival, batch statistics and penalties at work, at a rate at which rounding would soon show."""
    config = settings(kind, 50, rate=2e-3, network={"norm": norm}, training={"accumulation": accumulation})
    first, second = (rank.result for rank in run_ranks(watched_run, 2, config, tmp_path, timeout=300))
    assert first["logs"] == second["logs"]
    assert first["digests"] == second["digests"]
    assert any(name.startswith("adversary/lecam") for name in first["digests"][-1])
    assert first["revived"] > 0


def one_task(config: VQTrainConfig) -> VQTask:
    torch.manual_seed(0)
    accelerator = make_accelerator("fp32")
    torch.manual_seed(0)
    task = VQTask(config)
    task.prepare(accelerator, config.training.steps)
    return task


def micro_batches(config: VQTrainConfig, task: VQTask, step: int = 0) -> list[dict[str, Any]]:
    """This process's share of a step."""
    assert isinstance(config.data, ScenesDataConfig)
    accelerator, training = task.passes.accelerator, config.training
    batches = train_batches(
        open_splits(config.data)[0],
        batch_size=training.batch_size,
        micro_batches=training.accumulation,
        seed=0,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start_step=step,
    )
    return [to_device(batch, accelerator.device) for batch in next(batches)]


@pytest.mark.parametrize(
    ("kind", "norm"), [("ema", "spectral"), pytest.param("nearest", "none", marks=pytest.mark.slow)]
)
def test_micro_batches_are_one_batch(kind: str, norm: str):
    """Weights of both players, the codebook and the adaptive weight after some steps."""
    whole, parts = (settings(kind, 4, network={"norm": norm}, training={"accumulation": n}) for n in (1, 2))
    states, weights = [], []
    for config in (whole, parts):
        task = one_task(config)
        logs = [task.train_step(micro_batches(config, task, step), step) for step in range(3)]
        weights.append([float(log["adaptive_weight"]) for log in logs])
        states.append(
            {
                f"{n}/{k}": v
                for n in ("model", "discriminator")
                for k, v in task.modules()[n].state_dict().items()
            }
        )
    assert weights[1] == pytest.approx(weights[0], rel=1e-5)
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=1e-6, msg=name)


def test_a_repeated_forward_draws_the_same(monkeypatch: pytest.MonkeyPatch):
    """Dropout and drawn codes: what is judged is what learns."""
    quantizer = {"kind": "gumbel", "codebook_size": 24, "code_dim": 4}
    values = settings("ema", 1, training={"accumulation": 3, "batch_size": 6}).model_dump()
    values["model"] |= {"quantizer": quantizer, "dropout": 0.3}
    config = build_config(VQTrainConfig, values)
    task = one_task(config)
    judged, followed = [], []
    judge, go_back = task.passes.judge, task.passes._go_back

    def judging(output: Any, *rest: Any, **named: Any) -> Any:
        judged.append(output.reconstruction.detach())
        return judge(output, *rest, **named)

    def going_back(output: Any, *rest: Any) -> Tensor:
        followed.append(output.reconstruction.detach())
        return go_back(output, *rest)

    monkeypatch.setattr(task.passes, "judge", judging)
    monkeypatch.setattr(task.passes, "_go_back", going_back)
    task.train_step(micro_batches(config, task), 0)
    assert len(judged) == 3
    for picture, again in zip(judged[-1:] + judged[:-1], followed, strict=True):
        assert torch.equal(picture, again)
    assert not torch.equal(judged[0], judged[1])


def poison(task: VQTask, batches: list[dict[str, Any]], where: str) -> Callable[[], None]:
    """Let something be NaN in the next step; returns what ends it."""
    if where == "picture":
        batches[-1]["image"][-1, 0, 3, 3] = float("nan")
        return lambda: None
    weight = {
        "gradient": task.model.encoder.conv_in.weight,
        "discriminator": next(task.adversary.discriminator.parameters()),
    }[where]
    return weight.register_hook(lambda gradient: gradient * float("nan")).remove


CASES = [("picture", 2, "stop"), ("discriminator", 2, "skip")]
MORE_CASES = [("gradient", 1, "skip"), ("discriminator", 1, "stop")]
"""What is NaN on one process, the number of micro-batches, and the policy."""


def nan_config(accumulation: int, policy: str) -> VQTrainConfig:
    norm = "spectral" if accumulation == 2 else "batch"
    training = {"accumulation": accumulation, "on_nonfinite": policy}
    values = settings("ema", 10, network={"norm": norm}, training=training).model_dump()
    values["discriminator"]["guard"] = None
    return build_config(VQTrainConfig, values)


def left_out(rank: int, cases: list[tuple[str, int, str]]) -> list[dict[str, Any]]:
    """Of each case: a step, another one that is poisoned on process 1, and a third."""
    results = []
    for where, accumulation, policy in cases:
        config = nan_config(accumulation, policy)
        task = one_task(config)
        task.train_step(micro_batches(config, task), 0)
        before = digests(task)
        batches, end = micro_batches(config, task, 1), lambda: None
        if rank == 1:
            end = poison(task, batches, where)
        error = None
        try:
            logs = task.train_step(batches, 1)
        except UserError as raised:
            error, logs = str(raised), {}
        end()
        after = digests(task)
        counted = after.pop("nonfinite/_extra_state") != before.pop("nonfinite/_extra_state")
        notes = task.notes()
        task.train_step(micro_batches(config, task, 2), 2)
        results.append(
            {
                "error": error, "logs": logs, "notes": notes, "counted": counted, "last": digests(task),
                "changed": [name for name in after if after[name] != before[name]],
                "skipped": task.nonfinite.skipped,
            }
        )  # fmt: skip
    return results


NAMES = {
    "picture": r"nll, rec, [a-z_, ]+ \(process 1 of 2\)",
    "gradient": r"the gradient of the model \(process 1 of 2\)",
    "discriminator": r"the gradient of the discriminator \(process 1 of 2\)",
}


@pytest.mark.parametrize("cases", [CASES, pytest.param(MORE_CASES, marks=pytest.mark.slow)])
def test_nothing_moves_where_one_process_meets_a_nan(cases: list[tuple[str, int, str]]):
    outcomes = run_ranks(left_out, 2, cases)
    assert [outcome.error for outcome in outcomes] == [None, None]
    for (where, _, policy), first, second in zip(cases, *(o.result for o in outcomes), strict=True):
        assert first["error"] == second["error"]
        assert first["changed"] == second["changed"] == []
        assert first["last"] == second["last"]
        assert not first["logs"]
        if policy == "stop":
            assert re.search(f"diverged at step 1: {NAMES[where]}.*on_nonfinite=skip", first["error"])
            assert not first["counted"]
        else:
            assert first["error"] is None
            assert first["counted"]
            assert first["skipped"] == 1
            assert re.search(f"left out, the 1st of the run: {NAMES[where]}", first["notes"][0])


def test_a_first_step_that_is_left_out_leaves_no_trace():
    """In the first batch activation normalisation sets itself, and k-means begins to wait."""
    values = settings("ema", 10, network={"norm": "actnorm"}, training={"on_nonfinite": "skip"}).model_dump()
    values["model"]["quantizer"] |= {"codebook_size": 1024}  # more than a step's latents
    config = build_config(VQTrainConfig, values)
    found, wanted = one_task(config), one_task(config)
    batches = micro_batches(config, found)
    poison(found, batches, "picture")
    assert found.train_step(batches, 0) == {}
    for task in (found, wanted):
        task.train_step(micro_batches(config, task), 0)
    after, alone = digests(found), digests(wanted)
    assert [name for name in after if after[name] != alone[name]] == ["nonfinite/_extra_state"]


@pytest.mark.slow
def test_what_k_means_waits_for_is_resumed(tmp_path: Path):
    """Its first two steps' latents, when a run is cut between them."""
    states = []
    for name, parts in (("whole", (3,)), ("parts", (1, 3))):
        for steps in parts:
            values = settings("nearest", steps).model_dump()
            values["model"]["quantizer"]["codebook_size"] = 500  # 512 latents a step
            values["discriminator"] = None
            train(build_config(VQTrainConfig, values), tmp_path / name)
        folder = list_checkpoints(tmp_path / name / "checkpoints")[-1]
        states.append(load_file(folder / "modules.safetensors"))
    assert states[0]["model/quantize.initialised"]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def drifting(rank: int) -> str:
    task = one_task(settings("ema", 1))
    verify_processes(task.modules(), 0)
    with torch.no_grad():
        task.model.decoder.conv_out.bias[0] *= 1 + rank * 2e-7
    try:
        verify_processes(task.modules(), 7)
    except UserError as error:
        return str(error)
    return ""


def failing_run(rank: int, config: VQTrainConfig, folder: Path) -> None:
    real = VQTask.train_step

    def fails(task: VQTask, batches: list[dict[str, Any]], step: int) -> dict[str, Tensor]:
        if step == 1 and rank == 1:
            raise RuntimeError("a fault of the toolkit")
        return real(task, batches, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VQTask, "train_step", fails)
        train(config, folder)


def test_drift_is_found_and_nobody_waits_for_one_that_failed(tmp_path: Path):
    for outcome in run_ranks(drifting, 2):
        assert "drifted apart by step 7: 1 of" in outcome.result
        assert "model/decoder.conv_out.bias" in outcome.result
    outcomes = run_ranks(failing_run, 2, settings("ema", 4), tmp_path, timeout=40)
    assert all(outcome.error is not None and outcome.seconds < 30 for outcome in outcomes)
    assert isinstance(outcomes[0].error, UserError)
    assert str(outcomes[1].error) == "a fault of the toolkit"


GAN_PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sagan": (
        {"kind": "sagan", "channels": 8, "multipliers": [2, 1], "attention": {"resolutions": [8]}},
        {"kind": "sagan", "channels": 8, "multipliers": [1, 2], "attention": {"resolutions": [8]}},
    ),
    "vitgan": (
        {"kind": "vitgan", "width": 16, "num_heads": 2, "depth": 1, "patch_size": 2, "style_dim": 8},
        {"kind": "vitgan", "width": 16, "num_heads": 2, "depth": 1},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("pair", "accumulation"), [("sagan", 1), ("vitgan", 2)])
def test_two_processes_with_a_gan_systems_decoder_are_one(tmp_path: Path, pair: str, accumulation: int):
    """Statistics of the batch over both processes, and power iterations that all move alike."""
    decoder, network = GAN_PAIRS[pair]
    config = settings("ema", 4)
    model = {**config.model.model_dump(), "decoder": decoder}
    values = config.model_dump() | {"model": model}
    assert config.discriminator is not None
    values["discriminator"] = config.discriminator.model_dump() | {"network": network}
    config = build_config(VQTrainConfig, values)
    # Batch normalisation divides by deviations, which are rounded otherwise where two processes sum them up.
    check_one_run(config, tmp_path, accumulation=accumulation, figures_within=1e-3)
