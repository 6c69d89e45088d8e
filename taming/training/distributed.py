"""Devices, precision, and the processes that a launcher started."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    patch_environment,
)
from torch import nn

from taming.errors import ConfigError, UserError
from taming.training.sharded import is_sharded
from taming.training.sharding import EXAMPLE, flag

PROCESS_TIMEOUT = timedelta(minutes=30)
"""A process that waits longer for another gives up. Others wait while the main one writes a checkpoint or
draws a preview, so it is long; a process that dies is noticed at once, whatever this is."""
OTHER_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def native_bf16() -> bool:
    """Whether this machine multiplies bf16 natively, so that it is faster than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Older releases cannot tell; fp32 is then the choice that is never wrong.
    probe: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    capabilities = probe()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def resolve_precision(precision: str) -> str:
    """Replace "auto" by "bf16" or "fp32", whichever is right for this machine."""
    if precision == "auto":
        return "bf16" if native_bf16() else "fp32"
    return precision


def make_accelerator(precision: str) -> Accelerator:
    """An Accelerator for "auto" | "bf16" | "fp32"; the number of processes comes from its launcher.

    Accelerate is told nothing of sharding: torch does that (`taming.training.sharding`), in the same way on
    GPUs and CPUs. Raises UserError for a launch that would not do what it says.
    """
    check_launch()
    # What Accelerate calls it, which newer releases of torch call otherwise.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    # Accelerate keeps the precision of a process's first run for all later ones, and refuses another.
    AcceleratorState._reset_state()
    on_cpu = _launched_on_cpu()
    _join_gpus(on_cpu)
    with patch_environment(ACCELERATE_USE_FSDP="false"):
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision={"bf16": "bf16", "fp32": "no"}[resolve_precision(precision)],
            # Losses are divided by the task; an environment that says otherwise would divide them twice.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT),
                # All processes move buffers alike: sending a codebook in every forward would only hide where
                # they do not.
                DistributedDataParallelKwargs(broadcast_buffers=False),
            ],
        )
    if accelerator.num_processes < _world_size():
        raise UserError(
            f"{_world_size()} processes were started, but on {accelerator.device} they cannot reach each "
            "other; set ACCELERATE_USE_CPU=true, or start one"
        )
    return accelerator


def check_launch() -> None:
    """Raises ConfigError for what Accelerate's config or launcher asks for and a run would not do."""
    for name, variable in (("DeepSpeed", "DEEPSPEED"), ("Megatron-LM", "MEGATRON_LM")):
        if flag(f"ACCELERATE_USE_{variable}"):
            raise ConfigError(
                f"Accelerate's config asks for {name}, which is not supported; use distributed_type "
                f"MULTI_GPU, or FSDP for a large transformer ({EXAMPLE})"
            )
    if flag("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise ConfigError(
            "Accelerate's config has a parallelism_config (tensor, context or sequence parallelism), which "
            "is not supported; leave it out: FSDP shards over all processes"
        )
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO")
    if compiler.upper() != "NO":
        raise ConfigError(
            f"Accelerate's config compiles whole models (dynamo_backend {compiler}), which is not supported; "
            "set it to no; in stage two, compile=true compiles the transformer's blocks"
        )
    # Without mpirun, `accelerate launch --cpu` starts one process, whatever --num_processes says; a port is
    # all that it leaves of the others.
    alone = not any(name in os.environ for name in OTHER_RANKS)
    if flag("ACCELERATE_USE_CPU") and "MASTER_PORT" in os.environ and alone:
        raise ConfigError(
            "accelerate launch --cpu starts a single process, whatever --num_processes says; start several "
            "with taming launch --cpu N ... or torchrun --nproc_per_node N -m taming ..."
        )


def launch_notes(precision: str) -> list[str]:
    """What the user should know of how the processes were launched."""
    asked, used = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), resolve_precision(precision)
    if asked in ("no", used):  # its launcher says "no" where nobody chose
        return []
    return [
        f"Accelerate's config says mixed_precision {asked}; training.precision {precision} decides: this run "
        f"computes in {used}"
    ]


def reduced_if(last: bool, accelerator: Accelerator, model: nn.Module) -> AbstractContextManager[None]:
    """Around a micro-batch's backward: processes exchange the gradients of `model` only with the last one.

    Where the weights are sharded, with each: gradients in one piece would take the memory that sharding and
    accumulation are there to save.
    """
    if last or is_sharded(model):
        return nullcontext()
    unreduced: AbstractContextManager[None] = accelerator.no_sync(model)
    return unreduced


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or the fastest there is. Raises UserError where it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"no device {name!r} on this machine ({reason}); use --device cpu") from None
    return device


def _launched_on_cpu() -> bool:
    """Whether the processes use the CPU; where there is no GPU, Accelerate would take each for one alone."""
    if flag("ACCELERATE_USE_CPU"):
        return True
    device = torch.accelerator.current_accelerator(check_available=True)
    return _world_size() > 1 and (device is None or device.type == "mps")


def _join_gpus(on_cpu: bool) -> None:
    """Start the process group of GPUs, bound to this process's own; Accelerate's would not be."""
    if on_cpu or not torch.cuda.is_available() or "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if here > gpus:
        raise UserError(
            f"{here} processes were started on this machine, which has {gpus} GPU(s): start at most {gpus}, "
            "or set ACCELERATE_USE_CPU=true to train on the CPU"
        )
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=PROCESS_TIMEOUT, device_id=device)


def _world_size() -> int:
    """How many processes the launcher says that it started."""
    return int(os.environ.get("WORLD_SIZE", "1"))
