"""Checkpoints: whole or absent, and free of code.

A checkpoint is a folder RUN/checkpoints/step-00001000 with

    modules.safetensors       weights and buffers of every module, "NAME/KEY"
    optimizers.safetensors    tensors of every optimiser's state, "NAME/PARAMETER/KEY"
    random-RANK.safetensors   state of the random generators of each process
    progress.json             step, param_groups, whatever else is plain
    manifest.json             the number of processes; size and sha256 of each of these; written last

It is written as step-N.tmp, synced to the disk and renamed, and only then are older ones removed: a
process that is killed at any moment leaves the last whole checkpoint in place. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from taming.atomic import REMOVING, REPLACED, TEMPORARY, put_in_place, remove_folder, sync
from taming.disk import full_disk
from taming.errors import ArtifactError, FaultError
from taming.tensor_file import Written, tensor_bytes, write_tensors
from taming.training.agreement import Agreement
from taming.training.sharded import state_in_parts

MANIFEST, PROGRESS = "manifest.json", "progress.json"
MODULES, OPTIMIZERS = "modules.safetensors", "optimizers.safetensors"
RANDOM = "random-{}.safetensors"
WRITTEN = "written-{}.json"
"""What a process says it wrote, for the manifest."""
SHARED = "all machines of a run must share the folder training.output"
WAY_ON = "free some space and go on with --resume auto"
EXTRA = "_extra_state"
"""torch's name of what a module itself says of its state, of any shape."""
NAME = re.compile(r"step-(\d{8,})")


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
    agreement: Agreement | None = None,
) -> Path:
    """Write root/step-N; every process must call it. Returns the folder.

    Of the older ones the newest `keep` stay, and the newest up to `healthy_step`. `agreement` is the run's
    own, where there is one.
    Raises FaultError on all processes where one cannot write, naming path, bytes needed and bytes free; the
    checkpoints before it stay, and what was written of it goes.
    """
    final = root / f"step-{step:08d}"
    temporary = final.with_name(final.name + TEMPORARY)
    main, rank, processes = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    agreement = agreement or Agreement()
    # Asked of every process: the parts of sharded weights come together.
    weights: dict[str, Tensor] = {}
    for name, module in modules.items():
        weights.update({f"{name}/{key}": value for key, value in module.state_dict().items()})
    groups, state = _split_optimizers(optimizers)

    def begin() -> None:
        if main:
            if not root.is_dir():
                root.mkdir(parents=True)
                sync(root.parent)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()

    def write() -> None:
        if not temporary.is_dir():
            raise FaultError(f"process {rank} does not see {temporary}, which process 0 has made: {SHARED}")
        part = _Part(temporary, rank)
        part.tensors(RANDOM.format(rank), _random_state())
        if main:
            part.tensors(MODULES, weights)
            part.tensors(OPTIMIZERS, state)
            part.json(PROGRESS, {"step": step, "groups": groups, **progress})
        part.finish()

    def publish() -> None:
        if main:
            files = _merged(temporary, processes)
            _write_json(temporary / MANIFEST, {"processes": processes, "files": files})
            sync(temporary)
            put_in_place(temporary, final)
            tidy(root, step, keep=keep, healthy_step=healthy_step)

    for stage in (begin, write, publish):
        try:
            agreement.together(partial(_or_full_disk, stage, final, tensor_bytes(weights | state)))
        except FaultError:
            if main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
    return final


def load_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
) -> dict[str, Any]:
    """Restore everything in place; returns what was given as `progress`, with "step".

    With another number of processes than saved it, those that are new keep the random state that their seed
    gave them (`other_processes` says so). Raises ArtifactError where the checkpoint is damaged, lacks
    something, or is of another architecture.
    """
    problem = verify_checkpoint(folder)
    if problem:
        raise ArtifactError(
            f"checkpoint {folder}: {problem}; resume from another with --resume PATH "
            "or start anew in another training.output"
        )
    saved = _read_tensors(folder / MODULES)
    for name, module in modules.items():
        prefix = f"{name}/"
        state = {key[len(prefix) :]: value for key, value in saved.items() if key.startswith(prefix)}
        wanted = state_in_parts(module)
        if not state and wanted.keys() == {EXTRA}:
            continue  # counts that earlier versions did not keep: they start here
        _check_state(folder, name, state, wanted)
        module.load_state_dict(state)
    try:
        progress: dict[str, Any] = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        groups = progress.pop("groups")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(folder / PROGRESS, error) from None
    state = _read_tensors(folder / OPTIMIZERS)
    for name, optimizer in optimizers.items():
        if name not in groups:
            raise ArtifactError(f"checkpoint {folder} holds no optimiser {name!r}: it is of another model")
        _load_optimizer(name, optimizer, groups[name], state)
    random_file = folder / RANDOM.format(accelerator.process_index)
    if random_file.is_file():
        _set_random_state(_read_tensors(random_file))
    return progress


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """A file that its manifest vouches for; but whoever made it may have made that, too."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{path} cannot be read ({error}); resume from another checkpoint with --resume PATH"
    )


def other_processes(accelerator: Accelerator, folder: Path) -> str | None:
    """What the user should know where a checkpoint was saved by another number of processes; else None."""
    saved, now = _manifest(folder)["processes"], accelerator.num_processes
    if saved == now:
        return None
    return (
        f"{folder.name} was saved by {saved} process(es) and goes on with {now}: the pictures of each step "
        "stay the same, but dropout and other chance do not, nor do sums to the last bit"
    )


def list_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first. Folders without a manifest do not count."""
    finished = [
        path
        for path in root.glob("step-*")
        if NAME.fullmatch(path.name.removesuffix(REPLACED)) and (path / MANIFEST).is_file()
    ]
    return sorted(finished, key=lambda path: (checkpoint_step(path), not path.name.endswith(REPLACED)))


def latest_checkpoint(
    root: Path, *, up_to: int | None = None, damaged: list[str] | None = None
) -> Path | None:
    """The newest checkpoint (of those up to a step) whose files are all as its manifest says.

    `damaged` takes a line about each newer one that is not.
    """
    for folder in reversed(list_checkpoints(root)):
        if up_to is not None and checkpoint_step(folder) > up_to:
            continue
        problem = verify_checkpoint(folder)
        if problem is None:
            return folder
        if damaged is not None:
            damaged.append(f"{folder} is passed over: {problem}")
    return None


def remove_checkpoints_after(root: Path, step: int) -> None:
    """Remove what was saved later than `step`, the newest first."""
    for folder in reversed(list_checkpoints(root)):
        if checkpoint_step(folder) > step:
            remove_folder(folder)


def tidy(root: Path, step: int, *, keep: int, healthy_step: int = -1) -> None:
    """Bring `root` to what a save at `step` leaves, for a run that has done so or goes on from there.

    What a killed process left half written or half removed goes, and of the checkpoints up to `step` all but
    the newest `keep` and the newest up to `healthy_step`. Later ones are of no use where a run goes on from
    an earlier one, but stay until it comes to them. One process of a run may call this, while none reads.
    """
    for left in [*root.glob("step-*" + TEMPORARY), *root.glob("step-*" + REMOVING)]:
        shutil.rmtree(left, ignore_errors=True)
    for aside in root.glob("step-*" + REPLACED):
        final = aside.with_name(aside.name.removesuffix(REPLACED))
        if final.exists():
            remove_folder(aside)
        else:
            os.replace(aside, final)
    finished = [path for path in list_checkpoints(root) if checkpoint_step(path) <= step]
    healthy = [path for path in finished if checkpoint_step(path) <= healthy_step][-1:]
    for old in finished[:-keep]:
        if old not in healthy:
            remove_folder(old)


def checkpoint_step(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.removesuffix(REPLACED).removeprefix("step-"))


def verify_checkpoint(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = _manifest(folder)
        files, processes = manifest["files"], int(manifest["processes"])
        expected = {name: Written(entry["size"], entry["sha256"]) for name, entry in files.items()}
        if processes > len(files):
            return f"random states of its {processes} processes are missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({error!r})"
    parts = [MODULES, OPTIMIZERS, PROGRESS, *(RANDOM.format(rank) for rank in range(processes))]
    for name in dict.fromkeys([*parts, *expected]):
        path = folder / name
        if name not in expected or not path.is_file():
            return f"{name} is missing"
        wanted = expected[name]
        if path.stat().st_size != wanted.size or _sha256(path) != wanted.sha256:
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
        if key != EXTRA and saved[key].shape != value.shape:
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
    # Files hold rows one after another. Fused Adam goes through memory as it lies, without looking at
    # strides: moments of weights that lie channels last would each meet another weight's number.
    for weight, entries in optimizer.state.items():
        for key, value in entries.items():
            if value.shape == weight.shape and value.stride() != weight.stride():
                entries[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


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


class _Part:
    """The files of a checkpoint that one process writes."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.written: dict[str, Written] = {}

    def tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.written[name] = write_tensors(self.folder / name, tensors)

    def json(self, name: str, value: Any) -> None:
        self.written[name] = _write_json(self.folder / name, value)

    def finish(self) -> None:
        """Tell the main process what was written."""
        written = {name: entry._asdict() for name, entry in self.written.items()}
        _write_json(self.folder / WRITTEN.format(self.rank), written)


def _merged(folder: Path, processes: int) -> dict[str, Any]:
    """The files that all processes wrote, for the manifest. Raises FaultError where one's are not here."""
    files: dict[str, Any] = {}
    for rank in range(processes):
        told = folder / WRITTEN.format(rank)
        if not told.is_file():
            raise FaultError(
                f"process {rank} has written its part of {folder}, but process 0 does not see it: {SHARED}"
            )
        files |= json.loads(told.read_text(encoding="utf-8"))
        told.unlink()
    return files


def _or_full_disk(stage: Callable[[], None], final: Path, needed: int) -> None:
    try:
        stage()
    except OSError as error:
        partial = final.with_name(final.name + TEMPORARY)
        raise full_disk(error, "checkpoint", final, needed, partial=partial, way_on=WAY_ON) from error


def _manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def _write_json(path: Path, value: Any) -> Written:
    data = json.dumps(value, indent=1, sort_keys=True).encode()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return Written(len(data), hashlib.sha256(data).hexdigest())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
