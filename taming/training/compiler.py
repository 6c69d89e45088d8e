"""Whether torch.compile can work on this machine."""

from __future__ import annotations

import os
import shutil

import torch

from taming.errors import UserError

COMPILERS = ("g++", "clang++", "c++")


def check_compiler() -> None:
    """Raises UserError where torch.compile would find no compiler: before a training rather than in it.

    On a CPU it writes C++, on a GPU it needs Triton; the environment's CXX names another C++ compiler.
    """
    if torch.cuda.is_available():
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError(
                "compile needs Triton on this GPU, and it is not there; install the package triton, or set "
                "compile=false"
            )
        return
    named = os.environ.get("CXX")
    candidates = (named,) if named else COMPILERS
    if not any(shutil.which(name) for name in candidates):
        raise UserError(
            f"compile needs a C++ compiler and none of {', '.join(candidates)} is in the PATH; install one "
            "(g++, say), name it in the environment's CXX, or set compile=false"
        )
