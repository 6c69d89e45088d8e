"""FID, Inception Score and KID by torch-fidelity, in one pass of Inception over both sets of pictures.

Heusel et al. 2017 (arXiv:1706.08500), Salimans et al. 2016 (arXiv:1606.03498), Binkowski et al. 2018
(arXiv:1801.01401). Figures compare with published ones where the number of pictures does (usually 50000).

Axes: B pictures, C channels, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from taming.data.picture import to_uint8
from taming.errors import UserError
from taming.metrics.inception import load_inception, readable_weights

KID_SUBSET, ISC_SPLITS = 1000, 10
"""Pictures of one of KID's 100 draws and parts of the Inception Score, as published; less of few pictures."""


class Pictures8Bit(Dataset[Tensor]):
    """Pictures in the form that torch-fidelity reads: uint8 (3, H, W); grey ones with three like channels.

    `picture(i)` gives number i of `num`: uint8, or float in [-1, 1].
    """

    def __init__(self, picture: Callable[[int], Tensor], num: int) -> None:
        self.picture, self.num = picture, num
        self.read: Callable[[], None] = lambda: None
        """Called with each picture that is read."""

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.num:
            raise IndexError(index)
        self.read()
        picture = self.picture(index)
        pixels = picture if picture.dtype == torch.uint8 else to_uint8(picture)
        return pixels.expand(3, -1, -1) if pixels.shape[0] == 1 else pixels


def check_fidelity(weights: str | Path | None, channels: int) -> None:
    """Raises UserError where FID, IS and KID could not be measured: before pictures are painted for them."""
    if channels not in (1, 3):
        raise UserError(
            f"FID, IS and KID are of pictures with 1 or 3 channels, not {channels}; leave --fid out"
        )
    load_inception(weights, ["2048"])


def fidelity(
    generated: Pictures8Bit,
    real: Pictures8Bit,
    *,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """fid, inception_score with its deviation over parts, kid with its deviation over draws.

    `weights` is a file of torch-fidelity's Inception (null: its cache, or its download). Raises UserError
    where the package or the weights cannot be had, or there are fewer than two pictures.
    """
    fewest = min(len(generated), len(real))
    if fewest < 2:
        raise UserError(f"FID, IS and KID need two pictures or more of either set, not {fewest}")
    with readable_weights(weights) as path:
        import torch_fidelity

        done, total = 0, len(generated) + len(real)

        def read() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(min(done, total), total)

        generated.read = real.read = read
        place = torch.device(device)
        if place.type not in ("cpu", "cuda"):
            raise UserError(f"torch-fidelity computes on cpu or cuda, not {place}; use --device cpu")
        found: dict[str, Any] = torch_fidelity.calculate_metrics(
            input1=generated,
            input2=real,
            fid=True,
            isc=True,
            kid=True,
            isc_splits=min(ISC_SPLITS, len(generated)),
            kid_subset_size=min(KID_SUBSET, fewest),
            feature_extractor_weights_path=os.fspath(path),
            batch_size=batch_size,
            cuda=place.type == "cuda",
            cache=False,
            save_cpu_ram=True,  # no processes that read: what is read may be a memory map of ours
            verbose=False,
        )
    return {
        "fid": float(found["frechet_inception_distance"]),
        "inception_score": float(found["inception_score_mean"]),
        "inception_score_std": float(found["inception_score_std"]),
        "kid": float(found["kernel_inception_distance_mean"]),
        "kid_std": float(found["kernel_inception_distance_std"]),
    }


def fidelity_protocol(num_generated: int, num_real: int) -> dict[str, Any]:
    """How the figures of `fidelity` were measured."""
    return {
        "inception_score_splits": min(ISC_SPLITS, num_generated),
        "kid_subset_size": min(KID_SUBSET, num_generated, num_real),
    }
