"""Checkpoints: whole or absent, and free of code.

A checkpoint is a folder RUN/checkpoints/step-00001000 with

    modules.safetensors       weights and buffers of every module, "NAME/KEY"
    optimizers.safetensors    tensors of every optimiser's state, "NAME/PARAMETER/KEY"
    random-RANK.safetensors   state of the random generators of each process
    progress.json             step, param_groups, whatever else is plain
    manifest.json             size and sha256 of each of these, written last

It is written as step-N.tmp, synced to the disk and renamed, and only then are older ones removed: a
process that is killed at any moment leaves the last whole checkpoint in place. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from taming.errors import ArtifactError

MANIFEST = "manifest.json"
REPLACED = ".old"
"""Ends the name of a checkpoint that is being replaced by another of its step."""


def save_checkpoint(
    accelerator: Accelerator,
    root: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    progress: Mapping[str, Any],
    *,
    keep: int = 2,
    healthy_step: int = -1,
) -> Path:
    """Write root/step-N; every process must call it. Returns the folder.

    Of the older ones the newest `keep` stay, and the newest up to `healthy_step`.
    Raises ArtifactError naming path and size where the disk cannot take it; older ones stay.
    """
    final, temporary = root / f"step-{step:08d}", root / f"step-{step:08d}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    tensors: dict[str, Tensor] = {}
    try:
        _write_tensors(temporary / f"random-{accelerator.process_index}.safetensors", _random_state())
        if accelerator.is_main_process:
            for name, module in modules.items():
                tensors.update({f"{name}/{key}": value for key, value in module.state_dict().items()})
            _write_tensors(temporary / "modules.safetensors", tensors)
            groups, state = _split_optimizers(optimizers)
            _write_tensors(temporary / "optimizers.safetensors", state)
            _write_json(temporary / "progress.json", {"step": step, "groups": groups, **progress})
    except (OSError, RuntimeError) as error:
        needed = sum(value.nbytes for value in tensors.values())
        raise ArtifactError(
            f"checkpoint {final} was not written ({error}); it needs about {3 * needed / 2**20:.0f} MiB: "
            "free that much or set training.output to another disk; the checkpoint before it is whole"
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = sorted(path for path in temporary.iterdir())
        manifest = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files}
        _write_json(temporary / MANIFEST, {"processes": accelerator.num_processes, "files": manifest})
        _sync(temporary)
        aside = final.with_suffix(REPLACED)
        if (
            final.exists()
        ):  # a folder cannot be replaced at once: what it held counts until the new one is there
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(final, aside)
        os.replace(temporary, final)
        _sync(root)
        shutil.rmtree(aside, ignore_errors=True)
        finished = list_checkpoints(root)
        healthy = [path for path in finished if checkpoint_step(path) <= healthy_step][-1:]
        for old in finished[:-keep]:
            if old not in healthy:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
) -> dict[str, Any]:
    """Restore everything in place; returns what was given as `progress`, with "step".

    Raises ArtifactError where the checkpoint is damaged or of another architecture.
    """
    problem = verify_checkpoint(folder)
    if problem:
        raise ArtifactError(
            f"checkpoint {folder}: {problem}; resume from another with --resume PATH "
            "or start anew in another training.output"
        )
    saved = load_file(folder / "modules.safetensors")
    for name, module in modules.items():
        prefix = f"{name}/"
        state = {key[len(prefix) :]: value for key, value in saved.items() if key.startswith(prefix)}
        _check_state(folder, name, state, module.state_dict())
        module.load_state_dict(state)
    progress: dict[str, Any] = json.loads((folder / "progress.json").read_text())
    groups = progress.pop("groups")
    state = load_file(folder / "optimizers.safetensors")
    for name, optimizer in optimizers.items():
        if name not in groups:
            raise ArtifactError(f"checkpoint {folder} holds no optimiser {name!r}: it is of another model")
        _load_optimizer(name, optimizer, groups[name], state)
    random_file = folder / f"random-{accelerator.process_index}.safetensors"
    if random_file.is_file():
        # With another number of processes the new ones keep the state that their seed gave them.
        _set_random_state(load_file(random_file))
    return progress


def list_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first. Folders without a manifest do not count."""
    finished = [p for p in root.glob("step-*") if p.suffix != ".tmp" and (p / MANIFEST).is_file()]
    return sorted(finished, key=lambda path: (path.stem, path.suffix != REPLACED))


def latest_checkpoint(root: Path, *, up_to: int | None = None) -> Path | None:
    """The newest checkpoint (of those up to a step) whose files are all as its manifest says."""
    for folder in reversed(list_checkpoints(root)):
        if (up_to is None or checkpoint_step(folder) <= up_to) and verify_checkpoint(folder) is None:
            return folder
    return None


def remove_checkpoints_after(root: Path, step: int) -> None:
    """Remove what was saved later than `step`."""
    for folder in list_checkpoints(root):
        if checkpoint_step(folder) > step:
            shutil.rmtree(folder)


def checkpoint_step(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.stem.removeprefix("step-"))


def verify_checkpoint(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"] or _sha256(path) != expected["sha256"]:
            return f"{name} is damaged"
    return None


def _check_state(folder: Path, name: str, saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    missing, unexpected = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    if missing or unexpected:
        raise ArtifactError(
            f"checkpoint {folder} is of another architecture: in {name}, "
            f"{len(missing)} keys are missing ({', '.join(missing[:3]) or 'none'}) and "
            f"{len(unexpected)} are not expected ({', '.join(unexpected[:3]) or 'none'}); "
            "use the config saved in its run or train in another training.output"
        )
    for key, value in wanted.items():
        if saved[key].shape != value.shape:
            raise ArtifactError(
                f"checkpoint {folder} is of another architecture: {name}/{key} is {tuple(saved[key].shape)} "
                f"there and {tuple(value.shape)} here; use the config saved in its run"
            )


def _split_optimizers(
    optimizers: Mapping[str, Optimizer],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Optimiser states as (plain groups by name, tensors by "NAME/PARAMETER/KEY")."""
    groups: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, optimizer in optimizers.items():
        state = optimizer.state_dict()
        groups[name] = state["param_groups"]
        for index, entries in state["state"].items():
            for key, value in entries.items():
                tensors[f"{name}/{index}/{key}"] = torch.as_tensor(value)
    return groups, tensors


def _load_optimizer(name: str, optimizer: Optimizer, groups: Any, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        owner, index, key = path.split("/")
        if owner == name:
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _random_state() -> dict[str, Tensor]:
    """State of the generators of Python, numpy, torch and each GPU, as tensors."""
    version, keys, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=True)  # noqa: NPY002 (libraries draw from the global one)
    assert version == 3
    assert isinstance(numpy_state, tuple)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(keys, dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(numpy_state[1], dtype=np.int64)),
        "numpy_rest": torch.tensor(numpy_state[2:], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    gauss = state["python_gauss"].item()
    random.setstate((3, tuple(state["python"].tolist()), None if gauss != gauss else gauss))
    position, has_gauss, cached = state["numpy_rest"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))  # noqa: NPY002
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # A fresh copy: safetensors refuses tensors that share their memory.
    save_file({key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}, path)
    _sync(path)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Wait until the disk holds a file or a folder's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
