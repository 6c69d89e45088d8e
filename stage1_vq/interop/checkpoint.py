"""Checkpoints that somebody else pickled, read without running any of their code.

A pickle is a program: it may call whatever it names. `torch.load(weights_only=True)` builds tensors and plain
containers and refuses the rest; the few classes that published checkpoints carry beside their weights
(Lightning's callback, a script's arguments, numbers of numpy) become inert objects that only hold what is put
in them.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from taming.archive import check_stored
from taming.errors import ArtifactError

HARMLESS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.pt_callbacks.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "argparse.Namespace",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
)
"""Names in published checkpoints whose objects nobody needs: never imported, an inert object stands in."""

DAMAGED = (
    *(RuntimeError, EOFError, OSError, ValueError, LookupError),
    *(AttributeError, TypeError, AssertionError, struct.error),
)
"""What torch raises for bytes that are no checkpoint depends on where they stop."""


class Inert:
    """Stands in for an object of a class that is not loaded: takes anything, does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds: the pickled mapping, or the tensors of a .safetensors file, by name.

    Raises ArtifactError where it is missing, cut off, or names code that would have to be run.
    """
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise ArtifactError(f"checkpoint {path} {what}; give the path of a .ckpt, .pt or .safetensors file")
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"checkpoint {path} cannot be read: {error}; fetch it again") from None
    check_stored(path)
    try:
        # Old pickles make torch.load warn about how they were written, which is nobody's business here.
        with warnings.catch_warnings(), torch.serialization.safe_globals([(Inert, n) for n in HARMLESS]):
            warnings.simplefilter("ignore")
            # Mapped, not read: most of a large checkpoint is the state of its optimisers.
            mapped = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ArtifactError(_refusal(path, str(error))) from None
    except DAMAGED as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise ArtifactError(
            f"checkpoint {path} is cut off or damaged ({first[:120]}); fetch it again"
        ) from None
    if not isinstance(content, Mapping):
        raise ArtifactError(f"checkpoint {path} holds {type(content).__name__}, not named tensors")
    return dict(content)


def tensors_of(content: Mapping[str, Any], path: Path, section: str) -> dict[str, Tensor]:
    """The named tensors of a checkpoint: those under `section`, or the content itself where it is flat.

    Floating-point tensors of any precision become fp32. Raises ArtifactError where there are none.
    """
    state = content.get(section, content)
    if not isinstance(state, Mapping):
        raise ArtifactError(f"checkpoint {path}: {section} is {type(state).__name__}, not named tensors")
    odd = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if odd or not state:
        found = ", ".join(map(str, list(content)[:8]))
        raise ArtifactError(
            f"checkpoint {path} has no weights under {section!r}, and is not a plain mapping of names to "
            f"tensors either (it holds: {found})"
        )
    for key, value in state.items():
        # A view may claim any shape: one number, repeated a billion times.
        if value.layout != torch.strided or value.nbytes > value.untyped_storage().nbytes():
            raise ArtifactError(
                f"checkpoint {path}: {key} is {tuple(value.shape)} and made of fewer numbers than that; it is"
                " not loaded"
            )
    return {str(key): value.float() if value.is_floating_point() else value for key, value in state.items()}


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refusal(path: Path, message: str) -> str:
    named = re.search(r"(?:GLOBAL |Unsupported global: |function |class )([\w.]+\.[\w.]+)", message)
    if named is None:
        first = message.split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
        return f"checkpoint {path} is damaged, or holds more than weights ({first[:120]}); it is not loaded"
    return (
        f"checkpoint {path} names {named[1]}, which loading it would run; only weights are read. If you "
        "trust its maker, save its weights alone and import those"
    )
