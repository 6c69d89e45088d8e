"""What Accelerate's config says of sharding (FSDP), checked: what a run would not do is refused up front."""

from __future__ import annotations

import os
from dataclasses import dataclass

from taming.errors import ConfigError

BLOCK = "Block"
"""Name of the transformer's block, which is gathered as one."""
EXAMPLE = "see configs/accelerate/fsdp.yaml"
"""Where a config that works is shown."""


@dataclass(frozen=True)
class Sharding:
    """How weights, gradients and optimiser states are spread over all processes."""

    reshard_after_forward: bool = True
    """Free a block's whole weights between forward and backward, and gather them again."""
    by_block: bool = True
    """Gather block by block; else all weights at once, which spares less memory."""
    recompute: bool = False
    """Accelerate's activation checkpointing: that is `recompute` of a training config."""


def read_sharding() -> Sharding | None:
    """The sharding that the launcher asks for; None without. Raises ConfigError for what is not supported."""
    if not flag("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "Accelerate's config asks for FSDP version 1; set fsdp_version: 2 (or --fsdp_version 2), "
            + EXAMPLE
        )
    if flag("FSDP_OFFLOAD_PARAMS"):
        raise ConfigError(
            "fsdp_offload_params is not supported; set it to false and save memory with recompute=true or a "
            "larger training.accumulation"
        )
    if os.environ.get("FSDP_IGNORED_MODULES"):
        raise ConfigError("fsdp_ignored_modules is not supported: everything is sharded; leave it out")
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP").upper()
    if policy not in ("TRANSFORMER_BASED_WRAP", "NO_WRAP"):
        raise ConfigError(
            f"fsdp_auto_wrap_policy {policy} is not supported; use TRANSFORMER_BASED_WRAP (a block at a "
            "time) or NO_WRAP (all weights at once)"
        )
    classes = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", BLOCK)
    if [name.strip() for name in classes.split(",")] != [BLOCK]:
        raise ConfigError(
            f"fsdp_transformer_layer_cls_to_wrap {classes} is no layer of this transformer; use {BLOCK}, or "
            "leave it out"
        )
    return Sharding(
        reshard_after_forward=_reshards(os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true")),
        by_block=policy != "NO_WRAP",
        recompute=flag("FSDP_ACTIVATION_CHECKPOINTING"),
    )


def refuse_sharding(what: str) -> None:
    """Raises ConfigError where the launcher asks for FSDP, which is not for `what` is to be trained."""
    if read_sharding() is not None:
        raise ConfigError(
            f"{what} is not trained with FSDP: it fits into every GPU, and its step needs whole weights; "
            "leave --fsdp out, or set distributed_type to MULTI_GPU in Accelerate's config"
        )


def _reshards(value: str) -> bool:
    if value.lower() in ("true", "1", "full_shard"):
        return True
    if value.lower() in ("false", "0", "shard_grad_op"):
        return False
    raise ConfigError(f"fsdp_reshard_after_forward {value} is not supported; use true or false")


def flag(variable: str) -> bool:
    """Whether an environment variable says yes."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t")
