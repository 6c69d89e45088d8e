"""From where a run goes on, and whether it may: the same config, the same data, nobody else in its folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from taming.config import Config, build_config, differences
from taming.errors import ArtifactError, ConfigError, UserError
from taming.training.checkpoint import latest_checkpoint, list_checkpoints

# Keys of a config that may change between a run and its resumption: they do not change what is learned
# from the steps already made.
FREE_KEYS = (
    "description",
    "training.output",
    "training.steps",
    "training.minutes",
    "training.workers",
    "training.log_every",
    "training.evaluate_every",
    "training.preview_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.evaluation_pictures",
    "training.on_nonfinite",
    "training.verify_processes_every",
    "data.cache",
    "data.cache_size",
    "data.skip_budget",
    "recompute",
    "compile",
)


def choose_checkpoint(run: Path, resume: str, passed_over: list[str]) -> Path | None:
    """What `--resume auto|never|PATH` means for the folder `run`. Raises UserError.

    `passed_over` takes a line about each damaged checkpoint that is newer than the chosen one.
    """
    existing = list_checkpoints(run / "checkpoints")
    if resume == "never":
        if existing:
            raise UserError(
                f"{run} already holds a run (newest: {existing[-1].name}) and --resume is never; choose "
                "another training.output, remove the folder, or use --resume auto"
            )
        return None
    if resume == "auto":
        return _newest(run, existing, passed_over)
    path = Path(resume).absolute()
    if not path.is_dir():
        raise UserError(
            f"--resume {resume}: no such checkpoint folder; use auto, never or RUN/checkpoints/step-N"
        )
    if existing := list_checkpoints(path / "checkpoints"):  # a run's folder was given
        return _newest(path, existing, passed_over)
    return path


def _newest(run: Path, existing: list[Path], passed_over: list[str]) -> Path | None:
    newest = latest_checkpoint(run / "checkpoints", damaged=passed_over)
    if newest is None and existing:
        raise ArtifactError(
            f"all {len(existing)} checkpoints of {run} are damaged ({passed_over[0]}); remove the folder to "
            "start anew"
        )
    return newest


def check_same_config(run: Path, config: Config) -> None:
    """Refuse to go on with a config that would have trained otherwise; show the difference."""
    saved_file = run / "config.yaml"
    if not saved_file.is_file():
        return
    saved = _bound(_as_written_today(saved_file, type(config)))
    if changed := differences(saved, _bound(config.model_dump(mode="json"))):
        raise UserError(
            f"the config is not the one {run} was trained with ({changed}); use {saved_file}, or train in "
            "another training.output"
        )


def check_same_data(checkpoint: Path, saved: str, now: str) -> None:
    """Refuse to go on with other data: its order would be another. Both are fingerprints."""
    if saved != now:
        raise UserError(
            f"the training data is not that of {checkpoint}: files came, went or changed; restore them, "
            "or train in another training.output"
        )


@contextmanager
def run_lock(run: Path, *, enabled: bool) -> Iterator[None]:
    """The folder is this process's while the context lasts. Raises UserError where another trains in it."""
    if not enabled:
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    # A lock of the process, which its children do not inherit: those of a killed run may outlive it.
    with (run / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is training in {run}; wait for it, stop it, or choose another "
                "training.output"
            ) from None
        except OSError:
            pass  # a file system without locks: nothing can be said
        yield


def _as_written_today(file: Path, schema: type[Config]) -> Any:
    """The saved config with the keys that it did not have yet, at the defaults that mean what was."""
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    try:
        return build_config(schema, values, source=str(file)).model_dump(mode="json")
    except ConfigError:
        return values  # of a time with other keys: they are shown as they are


def _bound(values: Any) -> dict[str, Any]:
    """What must not change, by dotted key."""
    flat = _flatten(values)
    return {
        key: value
        for key, value in flat.items()
        if not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
    }


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat
