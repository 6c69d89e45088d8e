"""What benchmarks/gans.py and benchmarks/gan_ablations.py share: runs of equal time, one thread each.

A run is a process of its own; runs that have written their figures are not made again. Its time is from the
first step to the end of training, evaluations on the way and the last save included; drawing the scenes and
timing the first steps are not in it. The number of steps follows from that timing, taken while the other
lane is as busy as it will be; a run that would take longer all the same is stopped on time, as by a user.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from taming.data.config import DataConfig
from taming.data.dataset import PictureDataset, open_dataset
from taming.gan.config import GANTrainConfig
from taming.gan.model import GANModel
from taming.gan.task import GANTask, model_config
from taming.gan.train import fit_to_time, train
from taming.training.checkpoint import latest_checkpoint, load_checkpoint
from taming.training.distributed import make_accelerator
from taming.training.loop import Interrupted

ROOT = Path(__file__).resolve().parents[1]
FIGURES = "figures.json"
GENEROUS, EVALUATIONS = 50, 8
"""Times a config's own steps that a run may have, and evaluations on its way."""


def train_for(config: GANTrainConfig, folder: Path, minutes: float) -> dict[str, Any]:
    """Train `config` for `minutes` in `folder`/run; writes and returns its figures."""
    data = config.data.model_copy(update={"num_validation": 256})
    config = config.model_copy(update={"data": data})
    splits = drawn(data, "train"), drawn(data, "validation")
    plenty = config.shortened(config.training.steps * GENEROUS)
    plenty = _with(plenty, minutes=minutes)
    torch.manual_seed(config.training.seed)
    config = fit_to_time(plenty, splits[0])
    steps = config.training.steps
    every = max(steps // EVALUATIONS, 1)
    config = _with(
        config,
        minutes=None,
        log_every=every,
        evaluate_every=every,
        preview_every=steps,
        checkpoint_every=steps,
    )
    model = GANModel(model_config(config, splits[0].class_names))
    begin = time.perf_counter()
    with stopped_after(60 * minutes):
        train(config, folder / "run", resume="never", splits=splits)
    seconds = time.perf_counter() - begin
    if steps_made(folder / "run") < steps:
        save_stopped(config, folder / "run", splits[0].class_names)
    return written(
        folder,
        {
            "seconds": seconds,
            "steps_meant": steps,
            "steps": steps_made(folder / "run"),
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "course": course(folder / "run"),
        },
    )


def drawn(data: DataConfig, split: str) -> PictureDataset:
    """The scenes of a split, all of them in memory."""
    dataset = open_dataset(data, split)  # type: ignore[arg-type]
    for first in range(0, len(dataset), 256):
        places = range(first, min(first + 256, len(dataset)))
        dataset.batch(places, [-1] * len(places))
    return dataset


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """A run inside that takes longer is told to save itself and to stop."""
    ended = threading.Event()

    def watch() -> None:
        ended.wait(seconds)
        while not ended.is_set():
            if signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:  # the run listens
                os.kill(os.getpid(), signal.SIGTERM)
                return
            ended.wait(0.1)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()
    try:
        with suppress(Interrupted):
            yield
    finally:
        ended.set()
        signal.signal(signal.SIGTERM, before)


def save_stopped(config: GANTrainConfig, run: Path, class_names: Sequence[str]) -> None:
    """Save the model of the newest checkpoint: a run that is stopped while it evaluates has saved none."""
    task = GANTask(config, class_names)
    accelerator = make_accelerator(config.training.precision)
    task.prepare(accelerator, config.training.steps)
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    load_checkpoint(accelerator, checkpoint, task.modules(), task.optimizers())
    shutil.rmtree(run / "model", ignore_errors=True)
    task.save_model(run / "model")


def course(run: Path) -> list[tuple[int, float]]:
    """(step, feature distance) of a run's evaluations."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        (record["step"], record["feature_distance"]) for record in records if record["kind"] == "validation"
    ]


def steps_made(run: Path) -> int:
    """Of the newest checkpoint."""
    folders = [path for path in (run / "checkpoints").iterdir() if path.is_dir()]
    return max(json.loads((path / "progress.json").read_text(encoding="utf-8"))["step"] for path in folders)


def written(folder: Path, figures: dict[str, Any]) -> dict[str, Any]:
    """`figures`, that are in the folder from now on: its run is made."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{FIGURES}.part"
    aside.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    aside.replace(folder / FIGURES)
    return figures


def read(folder: Path) -> dict[str, Any] | None:
    """The figures of a run that is made; None of another."""
    path = folder / FIGURES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def make_runs(
    script: Path, names: Sequence[str], out: Path, *, minutes: float, at_once: int, say: Callable[[str], None]
) -> None:
    """Make the runs that are missing, each by `script --run NAME --minutes M --out OUT`, `at_once` at a time.

    A run that fails is told of, and the others are made.
    """
    waiting = [name for name in names if read(run_folder(out, name)) is None]
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    if waiting:
        say(f"{len(waiting)} of {len(names)} runs to make, {at_once} at a time, {minutes:g} minutes each")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name = waiting.pop(0)
                folder = run_folder(out, name)
                shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off
                folder.mkdir(parents=True)
                command = [sys.executable, str(script), "--run", name, "--out", str(out)]
                with (folder / "output.txt").open("wb") as output:
                    process = subprocess.Popen(
                        [*command, "--minutes", str(minutes)],
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env=environment,
                        cwd=ROOT,
                    )
                running[name] = process, time.monotonic()
                say(f"{time.strftime('%H:%M:%S')} {name} begins")
            time.sleep(0.5)
            for name, (process, begun) in list(running.items()):
                if process.poll() is None:
                    if time.monotonic() - begun > 2 * 60 * minutes + 600:
                        process.kill()
                    continue
                del running[name]
                found = read(run_folder(out, name))
                if found is None:
                    lines = (run_folder(out, name) / "output.txt").read_text(errors="replace").splitlines()
                    say(f"{name} failed with {process.returncode}: {lines[-1] if lines else 'in silence'}")
                else:
                    say(f"{name}: {found['steps']} steps in {found['seconds']:.0f} s")
    finally:
        for process, _ in running.values():
            process.terminate()


def run_folder(out: Path, name: str) -> Path:
    """Where a run of that name lies: names may be sentences."""
    return out / "runs" / "".join(c if c.isalnum() else "-" for c in name)


def table(columns: Mapping[str, Callable[[str, Any], str]], rows: Mapping[str, Any]) -> str:
    """Markdown: heading -> cell of (name, row)."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name, row in rows.items():
        lines.append(f"| {' | '.join(cell(name, row) for cell in columns.values())} |")
    return "\n".join(lines) + "\n"


def facts(minutes: float, at_once: int) -> str:
    """What a reader must know to compare figures."""
    return (
        f"torch {torch.__version__}, one thread a run, {at_once} run(s) at a time on {os.cpu_count()} cores, "
        f"{minutes:g} minutes each; scenes at 32 px by class"
    )


def _with(config: GANTrainConfig, **changes: Any) -> GANTrainConfig:
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})
