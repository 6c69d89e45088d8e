"""Runs that are killed and go on: what test_kill.py drives, and a command for longer hunts.

    python -m tests.end_to_end.killing --kills 100 --seed 7 --out DIR [--only 'stage1-2p-*']

Each scenario trains once without interruption, and once more while it is killed again and again with
SIGKILL: at random moments, at a random operation on the files of a save, all processes or one of them.
What both leave must be equal to the last bit. torch is imported once; every process of a run is forked from
here, where nothing is ever computed. Everything random comes from the seed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torch.utils.tensorboard.writer  # a second, once for all runs
from safetensors.torch import load_file

import stage1_vq.train
import stage2_ar.train
import taming.gan.train
from stage1_vq import VQModel
from stage1_vq.config import VQModelConfig
from taming.artifact import content_hash
from taming.config import build_config
from taming.errors import UserError
from taming.training.checkpoint import checkpoint_step, latest_checkpoint, list_checkpoints
from tests.conftest import TINY_MODEL, ar_config, vq_config
from tests.taming.gan.gan_config import gan_config

STEPS = 12
TRAINING: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 4,
    "precision": "fp32",
    "log_every": 1,
    "evaluate_every": 4,
    "preview_every": 6,
    "checkpoint_every": 2,
}
TIMING = {"pictures_per_second", "data_wait"}
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
PATIENCE = 30.0
"""Seconds in which a process must leave once another one of its run is dead."""


@dataclass(frozen=True)
class Scenario:
    """One kind of run."""

    stage: int
    """0: a GAN by itself."""
    processes: int = 1
    workers: int = 0
    accumulation: int = 1
    collapses: bool = False
    """The guard goes back to an earlier state, so that checkpoints are replaced and removed."""
    sharded: bool = False
    """FSDP."""
    muon: bool = False
    system: str = ""
    """Of a GAN."""

    @property
    def name(self) -> str:
        own = "".join(f"-{name}" for name in ("collapses", "sharded", "muon") if getattr(self, name))
        what = f"gan-{self.system}" if self.system else f"stage{self.stage}"
        return f"{what}-{self.processes}p-{self.workers}w-{self.accumulation}a{own}"


SCENARIOS = (
    Scenario(1),
    Scenario(1, workers=2, accumulation=2),
    Scenario(1, processes=2, accumulation=2),
    Scenario(1, processes=2, workers=2),
    Scenario(1, collapses=True),
    Scenario(2, accumulation=2),
    Scenario(2, workers=2),
    Scenario(2, processes=2),
    Scenario(2, processes=2, workers=2, accumulation=2),
    Scenario(2, processes=2, sharded=True),
    Scenario(1, muon=True),
    Scenario(2, muon=True),
    Scenario(0, system="sagan"),
    Scenario(0, system="sagan", processes=2, workers=2),
    Scenario(0, system="transgan", accumulation=2),
    Scenario(0, system="transgan", processes=2),
)
GANS: dict[str, dict[str, Any]] = {
    # Spectral norm and conditional batch norm; two rates; the generator learns in every other step.
    "sagan": {"discriminator_steps": 2, "lecam": {}},
    # An average, views, noise a token from torch's generator, a schedule, and the most terms.
    "transgan": {
        "generator": {
            "kind": "transgan", "widths": [16, 4], "depths": [1, 1], "num_heads": 2, "noise_dim": 4,
            "locality": {}, "super_resolution": True,
        },
        "discriminator": {
            "kind": "transgan", "patch_widths": [8], "depths": [1], "num_heads": 2,
        },
        "loss": "wasserstein", "gradient_penalty": {}, "drift": 1e-3, "super_resolution": {},
        "augment": ["color", "translation", "cutout"], "generator_batch_size": 8,
    },
}  # fmt: skip


@dataclass
class Kill:
    """One death of a run."""

    scenario: str
    manner: str
    """moment | operation"""
    at: float
    """Seconds after the start (after the processes met, where one dies alone), or the operation's number."""
    whom: str
    """all | the rank of one process"""
    left: list[str] = field(default_factory=list)
    """What lay in the folder of checkpoints afterwards."""
    in_a_save: bool = False
    """Whether it left something half written, or half removed."""
    alive: float = 0.0
    """Seconds that the other processes needed to leave."""


def make_tokenizer(folder: Path) -> None:
    torch.manual_seed(0)
    VQModel(build_config(VQModelConfig, TINY_MODEL)).save_pretrained(folder)


def train(scenario: Scenario, run: Path, tokenizer: Path) -> None:
    """One process's part of a run."""
    training = {**TRAINING, "workers": scenario.workers, "accumulation": scenario.accumulation}
    data = {"kind": "scenes", "size": 16, "num_train": 13, "num_validation": 6, "flip": True}
    if scenario.system:
        data = {"kind": "scenes", "size": 8, "num_train": 13, "num_validation": 6, "flip": True}
        gan = gan_config(data=data, training=training, **GANS[scenario.system])
        taming.gan.train.train(gan, run)
        return
    optimizer = {"learning_rate": 1e-3, "method": "muon" if scenario.muon else "adam"}
    if scenario.stage == 2:
        transformer = {"kind": "llama", "num_layers": 1, "num_heads": 2, "width": 16, "residual_dropout": 0.2}
        config = ar_config(
            tokenizer=str(tokenizer), data=data, transformer=transformer, pkeep=0.8, keep="best",
            training=training, optimizer=optimizer,
        )  # fmt: skip
        stage2_ar.train.train(config, run)
        return
    quantizer = {
        "kind": "ema", "codebook_size": 16, "code_dim": 4, "decay": 0.8, "kmeans_init": True,
        "revive_after": 1, "revive_below": 0.3,
    }  # fmt: skip
    discriminator: dict[str, Any] = {
        "network": {"kind": "patchgan", "channels": 4, "num_layers": 1},
        "start_step": 5,
        "start_on_plateau": {"window": 2, "share": 0.9},
        "augment": ["color", "cutout"],
        "lecam": {},
        "guard": {"window": 2},
    }
    if scenario.collapses:
        discriminator["guard"] = {"window": 1, "share": 1e-6, "max_rollbacks": 2}
    config = vq_config(
        data=data, model={**TINY_MODEL, "quantizer": quantizer}, discriminator=discriminator,
        training=training, optimizer=optimizer,
    )  # fmt: skip
    stage1_vq.train.train(config, run)


def die_at(run: Path, number: int) -> None:
    """Let this process and its workers die just before its `number`-th operation on files of a save."""
    places = (str(run / "checkpoints"), str(run / "model"))
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in FILE_EVENTS:
            return
        path = arguments[0]
        folder = arguments[-1] if event in ("os.remove", "os.rmdir") else -1
        if isinstance(folder, int) and folder >= 0:  # relative to an open folder, as shutil.rmtree works
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        if isinstance(path, str | os.PathLike) and str(path).startswith(places):
            count += 1
            if count == number:
                os.killpg(0, signal.SIGKILL)

    sys.addaudithook(watch)


def fork(work: Callable[[], None], log: Path, environment: dict[str, str]) -> int:
    """Do `work` in another process, the first of its own group; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        os.environ.update(environment)
        work()
        code = 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


class Launch:
    """All processes of a run."""

    def __init__(self, scenario: Scenario, out: Path, run: Path, operation: int | None = None) -> None:
        """`operation`: where the process that saves dies."""
        self.codes: dict[int, int] = {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        many = {"WORLD_SIZE": str(scenario.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

        def work(rank: int) -> None:
            if operation is not None and rank == 0:
                die_at(run, operation)
            train(scenario, run, out / "tokenizer")

        self.pids = []
        self._words, self._said = out / f"{run.name}-0.txt", 0
        if self._words.is_file():
            self._said = self._words.stat().st_size
        for rank in range(scenario.processes):
            environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
            if scenario.processes > 1:
                environment |= {**many, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            if scenario.sharded:
                environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
            log = out / f"{run.name}-{rank}.txt"
            self.pids.append(fork(lambda rank=rank: work(rank), log, environment))

    def wait(self, seconds: float, *, for_any: bool = False) -> bool:
        """Until all (or any) of the processes have ended; False where the time is over before."""
        end = time.monotonic() + seconds
        while True:
            for rank, pid in enumerate(self.pids):
                if rank not in self.codes:
                    found, status = os.waitpid(pid, os.WNOHANG)
                    if found:
                        self.codes[rank] = os.waitstatus_to_exitcode(status)
            if len(self.codes) == len(self.pids) or (for_any and self.codes):
                return True
            if time.monotonic() > end:
                return False
            time.sleep(0.005)

    def wait_for_words(self) -> None:
        """Until the first process has said something, which it does when it has met the others."""
        while not (self._words.is_file() and self._words.stat().st_size > self._said):
            if self.wait(0.01, for_any=True):
                return

    def kill(self, ranks: list[int] | None = None) -> None:
        for rank in range(len(self.pids)) if ranks is None else ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pids[rank], signal.SIGKILL)


def what_is_left(run: Path) -> dict[str, Any]:
    """All that must be equal: hashes of each file of the newest checkpoint and of the model, and the log."""
    newest = latest_checkpoint(run / "checkpoints")
    assert newest is not None
    found: dict[str, Any] = {"checkpoints": [path.name for path in list_checkpoints(run / "checkpoints")]}
    for folder in (newest, run / "model"):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix == ".safetensors":
                name = f"{folder.name}/{path.relative_to(folder)}"
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    progress = json.loads((newest / "progress.json").read_text())
    del progress["log_size"]  # the figures of speed are of any length
    found["progress"] = progress
    found["log"] = [
        {key: value for key, value in json.loads(line).items() if key not in TIMING}
        for line in (run / "log.jsonl").read_text().splitlines()
    ]
    return found


def differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of what differs; of the log, its first different line."""
    names = [name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]
    for number, pair in enumerate(zip(wanted["log"], found["log"], strict=False)):
        if pair[0] != pair[1]:
            return [*names, f"line {number} of the log: {pair[0]} became {pair[1]}"]
    return names


def unfinished(run: Path) -> set[tuple[str, int]]:
    """What a save has left half written or half removed: names, and which folder it is."""
    paths = [*(run / "checkpoints").glob("step-*.*"), *run.glob("model.*")]
    return {(path.name, path.stat().st_ino) for path in paths}


def broken_models(run: Path) -> list[str]:
    """What is wrong with the saved model, which there is from the first save on and stays whole."""
    found = []
    for config in sorted((run / "model").rglob("config.json")):
        state = load_file(config.parent / "model.safetensors")
        if json.loads(config.read_text())["content_hash"] != content_hash(state):
            found.append(f"{config.parent} holds other weights than it says")
    saved = [path for path in list_checkpoints(run / "checkpoints") if checkpoint_step(path) > 6]
    if saved and not found and not (run / "model").is_dir():
        found.append(f"{run} has no model any more")
    return found


class Hunt:
    """Kills the runs of one scenario until enough have died; `failures` says what went wrong."""

    def __init__(self, scenario: Scenario, out: Path, seed: int) -> None:
        self.scenario, self.out = scenario, out / scenario.name
        self.out.mkdir(parents=True)
        self.random = random.Random(f"{seed}/{scenario.name}")
        self.kills: list[Kill] = []
        self.failures: list[str] = []
        self.finished = 0
        make_tokenizer(self.out / "tokenizer")

    def whole(self) -> None:
        """The run that nothing interrupts."""
        run, start = self.out / "whole", time.monotonic()
        launch = Launch(self.scenario, self.out, run)
        log = run / "log.jsonl"
        while not (log.is_file() and log.stat().st_size) and not launch.wait(0.01):
            pass
        self.startup = time.monotonic() - start
        if not launch.wait(300) or any(launch.codes.values()):
            launch.kill()
            raise RuntimeError(f"{self.scenario.name} does not even train: see {self.out}")
        self.seconds = time.monotonic() - start
        self.wanted = what_is_left(run)

    def go(self, kills: int) -> None:
        """Kill runs `kills` times, and let the last one end."""
        self.whole()
        while len(self.kills) < kills and not self.failures:
            self._one_run(kills)

    def _one_run(self, kills: int) -> None:
        run, at_the_end = self.out / f"killed-{self.finished}", 0
        while not self.failures:
            at_the_end += (run / "checkpoints" / f"step-{STEPS:08d}").is_dir()
            # Once is enough there: little is left to go wrong.
            planned = self._plan(run) if len(self.kills) < kills and at_the_end < 2 else None
            before = unfinished(run)
            operation = int(planned.at) if planned is not None and planned.manner == "operation" else None
            launch = Launch(self.scenario, self.out, run, operation)
            seconds = 300.0
            if planned is not None and planned.manner == "moment":
                seconds = planned.at
                if planned.whom != "all":
                    launch.wait_for_words()
            ended = launch.wait(seconds, for_any=True)
            if ended and any(launch.codes.values()):
                launch.wait(5)  # who left because of the dead may be seen before the dead
            if not ended and planned is None:
                launch.kill()
                self.failures.append(f"{run} hangs")
            elif planned is not None and (not ended or signal.SIGKILL in map(abs, launch.codes.values())):
                self._kill(launch, planned, run)
                planned.in_a_save = bool(unfinished(run) - before)
                continue
            elif not launch.wait(PATIENCE):
                launch.kill()
                self.failures.append(f"{run}: one process ended with {launch.codes}, another stays")
            elif any(launch.codes.values()):
                self.failures.append(f"{run} ended with {launch.codes}")
            else:
                different = differences(self.wanted, what_is_left(run))
                self.failures += [f"{run} is not as if it had never stopped: {name}" for name in different]
            launch.kill()
            self.finished += 1
            return

    def _plan(self, run: Path) -> Kill:
        steps = list_checkpoints(run / "checkpoints")
        ahead = 1 - (checkpoint_step(steps[-1]) / STEPS if steps else 0)
        alone = self.scenario.processes > 1 and self.random.random() < 0.4
        # Who dies alone has met the others: before, they would wait for it as long as torch lets them.
        if self.random.random() < 0.6:
            at = float(self.random.randint(40 if alone else 1, 60 + round(ahead * 240)))
            return Kill(self.scenario.name, "operation", at, "0" if alone else "all")
        first, last = 0.3 * self.startup, self.startup + ahead * (self.seconds - self.startup)
        at = self.random.uniform(0, last - self.startup) if alone else self.random.uniform(first, last)
        whom = str(self.random.randrange(self.scenario.processes)) if alone else "all"
        return Kill(self.scenario.name, "moment", at, whom)

    def _kill(self, launch: Launch, planned: Kill, run: Path) -> None:
        launch.kill(None if planned.whom == "all" else [int(planned.whom)])
        start = time.monotonic()
        if not launch.wait(PATIENCE):
            launch.kill()
            self.failures.append(f"{run}: the other process outlives {planned} by {PATIENCE} s")
        planned.alive = time.monotonic() - start
        launch.kill()  # what the workers of the dead still do
        launch.wait(5)
        folder = run / "checkpoints"
        planned.left = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        self.failures += broken_models(run)
        planned.left += sorted(path.name for path in run.glob("model.*"))
        self.kills.append(planned)


def hunt(
    scenarios: tuple[Scenario, ...], kills: int, seed: int, out: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Kill runs of all scenarios, about `kills` times in all; what came of it, for JSON."""
    shutil.rmtree(out, ignore_errors=True)
    report: dict[str, Any] = {"seed": seed, "kills": [], "failures": [], "equal": 0}
    for number, scenario in enumerate(scenarios):
        share = (kills * (number + 1)) // len(scenarios) - (kills * number) // len(scenarios)
        one, start = Hunt(scenario, out, seed), time.monotonic()
        one.go(share)
        report["kills"] += [asdict(kill) for kill in one.kills]
        report["failures"] += one.failures
        report["equal"] += one.finished - bool(one.failures)
        in_saves = sum(kill.in_a_save for kill in one.kills)
        say(
            f"{scenario.name}: {len(one.kills)} kills ({in_saves} in a save), {one.finished} runs ended, "
            f"{time.monotonic() - start:.0f} s; " + ("; ".join(one.failures) or "all equal")
        )
    return report


def hunt_for_some(rank: int, names: tuple[str, ...], kills: int, seed: int, out: Path) -> dict[str, Any]:
    """For tests.ranks, in a process where nothing was ever computed either."""
    multiprocessing.set_start_method("fork", force=True)  # of data workers: as in any process of a run
    said: list[str] = []
    report = hunt(tuple(s for s in SCENARIOS if s.name in names), kills, seed, out, said.append)
    return {**report, "said": said}


def main() -> None:
    parser = argparse.ArgumentParser(description="kill runs, and compare what is left")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", action="append", default=[], help="scenarios of such names: 'stage2-*'")
    options = parser.parse_args()
    chosen = [s for s in SCENARIOS if not options.only or any(fnmatch(s.name, part) for part in options.only)]
    torch.set_num_threads(1)
    report = hunt(
        tuple(chosen), options.kills, options.seed, options.out, lambda text: print(text, flush=True)
    )
    (options.out / "report.json").write_text(json.dumps(report, indent=1))
    sys.exit(bool(report["failures"]))


if __name__ == "__main__":
    main()
