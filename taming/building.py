"""Models from files: a config says what to build, and only what the weights beside it bear out is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from taming.artifact import load_state
from taming.errors import ArtifactError

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_MODULES_A_TENSOR = 16
"""Modules that a model has for each of its tensors, at most: containers and activations have none."""


class _TooLarge(Exception):
    pass


def build_with(make: Callable[[], ModuleT], state: Mapping[str, Tensor], *, source: str | Path) -> ModuleT:
    """The module that `make` builds, with all of `state`, in eval mode.

    It is built without memory first: a config that a stranger wrote may ask for any number of layers of any
    size. Raises ArtifactError naming what does not fit, before memory is taken for it.
    """
    limit = _MODULES_A_TENSOR * (len(state) + 16)
    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > limit:
            raise _TooLarge

    hook = register_module_module_registration_hook(count)
    try:
        with torch.device("meta"):
            skeleton = make()
    except _TooLarge:
        raise ArtifactError(
            f"{source} does not fit its config, which asks for far more layers than the {len(state)} tensors"
            " of its weights belong to"
        ) from None
    except (RuntimeError, TypeError, OverflowError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArtifactError(f"{source}: its config asks for what cannot be built ({first[:160]})") from None
    finally:
        hook.remove()
    check_shapes(skeleton, state, source=source)
    module = make()
    load_state(module, state, source=source)
    return module.eval()


def check_shapes(module: nn.Module, state: Mapping[str, Tensor], *, source: str | Path) -> None:
    """Raises ArtifactError where `module`, which may have no memory, is not what `state` belongs to."""
    load_state(module, {key: value.to("meta") for key, value in state.items()}, source=source)
