"""A small network that reads scenes: what samples show, measured without looking at what was asked for.

It is trained on built-in scenes as a tokenizer paints them, so that it judges what was sampled and not how
sharp codes are. `python benchmarks/conditions.py` makes one and says how well it reads held-out scenes.

Axes: B pictures, H W pixels, K classes, S skies.
"""

from __future__ import annotations

import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stage1_vq import VQModel
from taming.data.batch import to_device
from taming.data.dataset import ScenesDataset
from taming.data.scenes import CLASS_NAMES, PROTOTYPES
from taming.metrics.adherence import nearest_labels

LEARNING_RATE = 2e-3
SKIES = ("an evening sky", "a cloudy sky", "a clear sky")


class Reading(NamedTuple):
    """What is seen in pictures."""

    labels: Tensor
    """(B, H, W) int64: the label whose typical colours are nearest."""
    depth: Tensor
    """(B, 1, H, W) in about [0, 1]."""
    label: Tensor
    """(B, K) logits of the nearest object's class."""
    sky: Tensor
    """(B, S) logits of SKIES."""


class SceneReader(nn.Module):
    """A U of four levels that sees depth, the nearest object and the sky; labels go by colour."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [width, 2 * width, 2 * width, 4 * width]
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(_block(before, after, stride=2) for before, after in pairwise(widths))
        self.up = nn.ModuleList(
            _block(before + after, after, stride=1) for before, after in pairwise(reversed(widths))
        )
        self.depth = nn.Conv2d(width, 1, 1)
        self.words = nn.Sequential(
            nn.Linear(4 * width * 16 + 3 * 256, 256), nn.GELU(), nn.Linear(256, len(CLASS_NAMES) + len(SKIES))
        )

    def forward(self, images: Tensor) -> Reading:
        """Pictures (B, 3, H, W) in [-1, 1]."""
        levels = [functional.gelu(self.stem(images))]
        for block in self.down:
            levels.append(block(levels[-1]))
        # The normalised features forget how bright and how blue a sky is: its colours go beside them.
        seen = functional.adaptive_avg_pool2d(levels[-1], 4), functional.adaptive_avg_pool2d(images, 16)
        words = self.words(torch.cat([part.flatten(1) for part in seen], dim=1))
        x = levels.pop()
        for block in self.up:
            beside = levels.pop()
            x = block(torch.cat((functional.interpolate(x, size=beside.shape[2:]), beside), dim=1))
        return Reading(
            nearest_labels(images, PROTOTYPES),
            self.depth(x),
            words[:, : len(CLASS_NAMES)],
            words[:, len(CLASS_NAMES) :],
        )


def _block(before: int, after: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride=stride, padding=1),
        nn.GroupNorm(8, after),
        nn.GELU(),
        nn.Conv2d(after, after, 3, padding=1),
        nn.GroupNorm(8, after),
        nn.GELU(),
    )


def sky_of(texts: list[str]) -> Tensor:
    """Which of SKIES each scene's sentence names: (B,) int64."""
    return torch.tensor([SKIES.index(text.split(" under ")[1]) for text in texts])


@torch.no_grad()
def painted(tokenizer: VQModel, images: Tensor) -> Tensor:
    """Pictures as their codes show them."""
    return tokenizer.decode(tokenizer.encode(images)).clamp(-1, 1)


def train_reader(tokenizer: VQModel, scenes: ScenesDataset, seconds: float) -> SceneReader:
    """A reader from so many seconds of training on all of `scenes`, in eval mode."""
    torch.manual_seed(0)
    batch = to_device(scenes.batch(range(len(scenes)), [-1] * len(scenes)), "cpu")
    sky = sky_of(batch["text"])
    pictures = torch.cat([painted(tokenizer, part) for part in batch["image"].split(32)])
    reader = SceneReader()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    begin, step = time.perf_counter(), 0
    while (share := (time.perf_counter() - begin) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 50) * max(1 - share, 0.01)
        rows = torch.randint(len(pictures), (32,))
        # Half of them mirrored: what is read in words stays the same.
        images, depth = pictures[rows], batch["depth"][rows]
        if step % 2:
            images, depth = images.flip(3), depth.flip(3)
        read = reader(images)
        loss = (
            4 * functional.l1_loss(read.depth, depth)
            + functional.cross_entropy(read.label, batch["label"][rows])
            + functional.cross_entropy(read.sky, sky[rows])
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
    return reader.eval().requires_grad_(False)
