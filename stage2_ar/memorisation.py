"""Whether a transformer has learned its training pictures by heart.

In training: bits a code of a fixed sample of training pictures, un-augmented, beside those of held-out ones.
Afterwards: the same, and how much of a sample is one training picture. For each sample the nearest training
picture is that with the most equal codes at the same positions; their share is compared with the share that
held-out pictures, which the model has never seen, have in common with *their* nearest training picture. A
model that has learned what pictures are like has as much in common with its data as held-out pictures have.

Axes: S samples, M training pictures, N = h * w cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from stage1_vq.inputs import as_picture, model_input, restored
from stage2_ar.codes import CodeDataset, codes_of
from stage2_ar.config import MemorisationConfig
from stage2_ar.pipeline import ARPipeline
from stage2_ar.sampling.sample import SamplingSettings, picture_uniforms, sample_codes
from stage2_ar.transformer import code_log_likelihood
from taming.data.batch import to_device
from taming.data.dataset import PictureDataset
from taming.data.loader import evaluation_batches
from taming.data.order import epoch_order
from taming.data.picture import tile
from taming.errors import UserError
from taming.training.host_state import HostState
from taming.types import Batch

ADVICE = (
    "give more pictures (or more crops: `taming vq encode --views 10`), raise transformer.residual_dropout, "
    "use a smaller transformer, or stop here; keep: best saves the weights of the lowest held-out loss"
)
COPIED = 0.1
"""A sample that shares by so much more of its cells with a training picture than held-out pictures do is
copied in parts."""


class FixedSample(PictureDataset):
    """At most `count` samples of a data set, drawn once by `seed`: always the same ones."""

    def __init__(self, data: PictureDataset, count: int, seed: int = 0) -> None:
        self.data = data
        chosen = epoch_order(seed, 0, len(data))[: min(count, len(data))]
        self.indices: list[int] = np.sort(chosen).tolist()
        self.size, self.provides = data.size, data.provides
        self.class_names, self.num_labels = data.class_names, data.num_labels
        self.object_names = data.object_names

    def __len__(self) -> int:
        return len(self.indices)

    def sample(self, index: int, epoch: int, *, seed: int = 0) -> dict[str, Any]:
        return self.data.sample(self.indices[index], epoch, seed=seed)

    def fingerprint(self) -> str:
        return f"{self.data.fingerprint()}/{len(self)}"


class MemorisationWatch(HostState):
    """Compares training and held-out bits at each evaluation; once a run `observe` returns a warning."""

    saved = ("lowest", "train_there", "warned")

    def __init__(self, config: MemorisationConfig) -> None:
        super().__init__()
        self.config = config
        self.lowest, self.train_there = math.inf, math.inf
        self.warned = False

    def observe(self, train: float, held_out: float) -> str | None:
        """Bits a code of training and of held-out pictures, equal on all processes; the warning, once."""
        rises = held_out > (1 + self.config.rise) * self.lowest and train < self.train_there
        wide = held_out - train > self.config.gap * held_out
        lowest = self.lowest
        if held_out < self.lowest:
            self.lowest, self.train_there = held_out, train
        if self.warned or not (rises or wide):
            return None
        self.warned = True
        history = f", after {lowest:.3g} at best" if rises else ""
        return (
            f"the transformer learns its training pictures by heart: they cost {train:.3g} bits a code, "
            f"held-out ones {held_out:.3g}{history}; {ADVICE}"
        )


@dataclass(frozen=True)
class MemorisationResult:
    """What `measure_memorisation` finds."""

    figures: dict[str, float]
    """train_bits_per_code, held_out_bits_per_code; samples_in_common and held_out_in_common, the mean shares
    in [0, 1] of cells that equal those of the nearest training picture; most_in_common, the largest share of
    a sample; excess, their difference; pictures, training_pictures, samples: how many were looked at;
    memorised, 1 or 0: whether `excess` passes 0.1 or the gap between the bits that of MemorisationConfig."""
    sheet: Tensor
    """(3, H', W') in [-1, 1]: samples over their nearest training pictures, most alike first."""

    @property
    def verdict(self) -> str:
        """One line for the user."""
        facts = self.figures
        alike, most, control = (
            f"{facts[name]:.0%}" for name in ("samples_in_common", "most_in_common", "held_out_in_common")
        )
        train, held_out = (f"{facts[name]:.3g}" for name in ("train_bits_per_code", "held_out_bits_per_code"))
        said = (
            f"samples share {alike} of their codes with the nearest training picture ({most} at most), "
            f"held-out pictures {control}; training ones cost {train} bits a code, held-out ones {held_out}"
        )
        return (
            f"learned by heart: {said}; {ADVICE}" if facts["memorised"] else f"not learned by heart: {said}"
        )


@torch.no_grad()
def measure_memorisation(
    pipe: ARPipeline,
    train: PictureDataset,
    held_out: PictureDataset,
    *,
    samples: int = 32,
    limit: int = 4096,
    batch_size: int = 16,
    seed: int = 0,
    bounds: MemorisationConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MemorisationResult:
    """Compare `samples` pictures of a pipeline, one for each of so many held-out conditions, with its data.

    The bits are of as many training as held-out pictures. At most `limit` training pictures are searched,
    each as it is and mirrored, or in all stored views; beyond that a fixed sample of them. `progress` is
    called with (pictures done, in all). Raises UserError where a split is empty.
    """
    for name, data in (("training", train), ("held-out", held_out)):
        if not len(data):
            raise UserError(f"there are no {name} pictures; set a validation_fraction between 0 and 1")
    searched = FixedSample(train, limit, seed)
    control = FixedSample(held_out, limit, seed)
    probe = FixedSample(train, len(control), seed)
    drawn = FixedSample(control, samples, seed)
    total = 2 * len(control) + len(searched) + len(drawn)
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    train_bits, _ = _bits(pipe, probe, batch_size, report)
    held_out_bits, held_out_codes = _bits(pipe, control, batch_size, report)
    training_codes = _training_codes(pipe, searched, batch_size, report)
    sampled = _samples(pipe, drawn, batch_size, seed, report)
    shares, nearest = nearest_codes(sampled.flatten(1), training_codes)
    control_shares, _ = nearest_codes(held_out_codes, training_codes)
    excess = float(shares.mean() - control_shares.mean())
    bounds = bounds or MemorisationConfig()
    gap = held_out_bits - train_bits
    figures = {
        "train_bits_per_code": train_bits,
        "held_out_bits_per_code": held_out_bits,
        "samples_in_common": float(shares.mean()),
        "held_out_in_common": float(control_shares.mean()),
        "most_in_common": float(shares.max()),
        "excess": excess,
        "memorised": int(excess > COPIED or gap > bounds.gap * held_out_bits),
        "pictures": len(control),
        "training_pictures": len(searched),
        "samples": len(drawn),
    }
    alike = shares.argsort(descending=True)[:16]
    grid = sampled.shape[1:]
    found = rearrange(training_codes[nearest[alike]].long(), "s (h w) -> s h w", h=grid[0])
    config = pipe.tokenizer.config
    rows = [
        as_picture(restored(pipe.decode(codes.to(pipe.device), batch_size), config), config).cpu()
        for codes in (sampled[alike.to(sampled.device)], found)
    ]
    return MemorisationResult(figures, tile(torch.cat(rows), columns=len(alike)))


def nearest_codes(codes: Tensor, training: Tensor, chunk: int = 2**24) -> tuple[Tensor, Tensor]:
    """Codes (S, N) and training codes (M, N) -> (S,) largest shares of equal cells in [0, 1], and (S,) whose.

    Of several that are equally near the first.
    """
    shares, nearest = [], []
    codes, training = codes.cpu().to(training.dtype), training.cpu()
    for row in codes:
        counts = torch.cat(
            [(part == row).sum(dim=1) for part in training.split(max(chunk // training.shape[1], 1))]
        )
        best = int(counts.argmax())
        shares.append(counts[best] / training.shape[1])
        nearest.append(best)
    return torch.stack(shares), torch.tensor(nearest)


def _batches(pipe: ARPipeline, data: PictureDataset, batch_size: int) -> Iterator[Batch]:
    return (to_device(batch, pipe.device) for batch in evaluation_batches(data, batch_size=batch_size))


def _bits(
    pipe: ARPipeline, data: PictureDataset, batch_size: int, report: Callable[[int], None]
) -> tuple[float, Tensor]:
    """(bits a code, codes (n, N)) of a data set."""
    nats, found = 0.0, []
    for batch in _batches(pipe, data, batch_size):
        codes = codes_of(pipe.tokenizer, batch)
        nats -= float(code_log_likelihood(pipe.model(codes, batch), codes.flatten(1)).sum())
        found.append(codes.flatten(1).cpu())
        report(len(codes))
    every = torch.cat(found)
    return nats / every.numel() / math.log(2), every


def _training_codes(
    pipe: ARPipeline, data: FixedSample, batch_size: int, report: Callable[[int], None]
) -> Tensor:
    """(M, N) int32: every stored view of codes; of pictures the codes as they are, and mirrored."""
    if isinstance(data.data, CodeDataset):
        report(len(data))
        return rearrange(data.data.columns["codes"][data.indices].int(), "m v h w -> (m v) (h w)")
    found = []
    for batch in _batches(pipe, data, batch_size):
        inputs = model_input(batch, pipe.tokenizer.config)
        found += [pipe.tokenizer.encode(view).flatten(1).int().cpu() for view in (inputs, inputs.flip(-1))]
        report(len(inputs))
    return torch.cat(found)


def _samples(
    pipe: ARPipeline, data: PictureDataset, batch_size: int, seed: int, report: Callable[[int], None]
) -> Tensor:
    """(S, h, w): a sample for the condition of each picture, on the CPU."""
    sampled, first, grid = [], 0, pipe.model.config.grid
    for batch in _batches(pipe, data, batch_size):
        count = len(batch["key"])
        uniforms = picture_uniforms(seed, first, count, grid[0] * grid[1])
        prefix = pipe.model.condition(batch, grid)
        transformer = pipe.model.transformer
        sampled.append(sample_codes(transformer, prefix, None, grid, uniforms, SamplingSettings()).cpu())
        first += count
        report(count)
    return torch.cat(sampled)
