"""A distance between two sets of pictures that needs no download: Fréchet's, over an untrained network.

Features of a network with random weights tell sets of pictures apart where those of a classifier of ImageNet
say little, and do not favour what ImageNet is made of (Naeem et al. 2020, arXiv:2002.09797, on random
embeddings). The distance of the two Gaussians is that of Heusel et al. (2017, arXiv:1706.08500). The network
is our own: figures compare with each other, and with nobody else's.

Axes: B N pictures, C channels, H W pixels, D features.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from taming.collective import sum_over_processes
from taming.data.picture import to_uint8
from taming.errors import UserError
from taming.metrics.frechet import FeatureMoments, frechet_distance

FEATURES, WIDTH, CELLS = 32, 24, 2
"""Features in all, filters a layer, and cells a side over which their responses are averaged."""
FLOOR = 0.05
"""Of a mean response, before its logarithm: what is weaker counts as flat."""
COLOUR_WEIGHT = 6.0
"""Of the quarters' colours: without it, textures in the wrong place would count for next to nothing."""
SMALLEST_SIDE = 4


class RandomFeatures(nn.Module):
    """Pictures (B, C, H, W) in [-1, 1] -> (B, 32) fp32; they are rounded to 8 bits, as files would be.

    The picture is seen at `levels` scales, each half of the one before. At each, random 3x3 filters of zero
    mean are rectified, and so are random filters of their halved map; the logarithms of the mean responses
    in the picture's quarters say how much of which texture is where (of a logarithm, so that faint detail
    counts beside strong edges). They and the quarters' colours are turned into 32 features by a random
    orthogonal matrix. All weights are of numpy's Philox: the same on every machine.
    """

    filters: Tensor
    second_filters: Tensor
    mix: Tensor

    def __init__(self, channels: int = 3, levels: int = 3) -> None:
        super().__init__()
        self.channels, self.levels = channels, levels
        first = [_normals(0, level, (WIDTH, channels, 3, 3)) for level in range(levels)]
        first = [_unit(filters - filters.mean((2, 3), keepdim=True)) for filters in first]
        second = [_normals(1, level, (WIDTH, WIDTH, 3, 3)) for level in range(levels)]
        second = [_unit(filters - filters.mean((1, 2, 3), keepdim=True)) for filters in second]
        responses = (channels + 2 * WIDTH * levels) * CELLS**2
        mix = torch.linalg.qr(_normals(2, levels, (responses, FEATURES)))
        # A decomposition's signs are its library's choice.
        signs = torch.where(mix.R.diagonal() < 0, -1.0, 1.0)
        for name, value in (
            ("filters", torch.stack(first)),
            ("second_filters", torch.stack(second)),
            ("mix", mix.Q * signs),
        ):
            self.register_buffer(name, value.float(), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        self._check(images)
        x = to_uint8(images).to(self.mix.device, torch.float32) / 127.5 - 1
        found = [COLOUR_WEIGHT * functional.adaptive_avg_pool2d(x, CELLS)]
        for level in range(self.levels):
            edges = functional.conv2d(_padded(x), self.filters[level]).abs()  # (B, WIDTH, H, W)
            halved = functional.avg_pool2d(edges, 2)
            corners = functional.conv2d(_padded(halved), self.second_filters[level]).relu()
            for responses in (edges, corners):
                found.append((functional.adaptive_avg_pool2d(responses, CELLS) + FLOOR).log())
            x = functional.avg_pool2d(x, 2)
        # A picture that is not finite has no features that are: 8 bits would hide it.
        spoilt = images.to(self.mix.device).float().flatten(1).sum(1, keepdim=True) * 0
        # (B, responses, CELLS, CELLS) -> (B, D)
        return torch.cat(found, dim=1).flatten(1) @ self.mix + spoilt

    def _check(self, images: Tensor) -> None:
        least = SMALLEST_SIDE * 2 ** (self.levels - 1)
        if images.ndim != 4 or images.shape[1] != self.channels or min(images.shape[2:]) < least:
            raise UserError(
                f"pictures have shape {tuple(images.shape)}; features at {self.levels} scales take "
                f"(B, {self.channels}, H, W) with sides of {least} pixels or more"
            )


class FeatureDistance:
    """Fréchet distance of generated pictures to real ones, over `RandomFeatures`.

    Pictures come in batches of any size, on any process of a run; `value` counts those of all of them.

    Small samples look further apart than they are. On the scenes at 32 px, two sets of real pictures are
    about 0.13 apart with 256 pictures each and 0.035 with 1000, where a 3x3 blur makes 0.36, one missing
    class of five 0.15, pictures upside down 4.6, and faint grey noise 17: 256 pictures do to follow a
    training, use 1000 or more to compare models that are alike. Figures compare where the size and the
    number of pictures are the same.
    """

    def __init__(
        self, size: tuple[int, int], channels: int = 3, *, device: torch.device | str = "cpu"
    ) -> None:
        """For pictures of `size` (H, W): from 32 px on, each doubling is seen at one more scale."""
        self.size, self.device = size, torch.device(device)
        self.features = RandomFeatures(channels, levels_of(size)).to(device)
        self.real, self.generated = FeatureMoments(FEATURES), FeatureMoments(FEATURES)

    def add_real(self, images: Tensor) -> None:
        """Count (B, C, H, W) in [-1, 1]."""
        self.real.add(self.features(images))

    def add_generated(self, images: Tensor) -> None:
        """Count (B, C, H, W) in [-1, 1]; what lies outside is clamped."""
        self.generated.add(self.features(images))

    def value(self) -> float:
        """The distance, at least 0, the same on every process, which must all ask.

        Raises UserError where either set has fewer than two pictures, or something generated is not finite.
        """
        return frechet_distance(self._all(self.real), self._all(self.generated))

    def _all(self, moments: FeatureMoments) -> FeatureMoments:
        total = FeatureMoments(FEATURES)
        total.merge(sum_over_processes(moments.packed().to(self.device)).cpu())
        if total.count and not total.mean.isfinite().all():
            raise UserError("pictures hold NaN or infinite values: the model has diverged")
        return total


def feature_distance(real: Tensor, generated: Tensor, *, batch_size: int = 256) -> float:
    """The distance of two sets of pictures (N, C, H, W) in [-1, 1] of one size, in this process."""
    distance = FeatureDistance((real.shape[2], real.shape[3]), real.shape[1], device=real.device)
    for part in real.split(batch_size):
        distance.add_real(part)
    for part in generated.split(batch_size):
        distance.add_generated(part)
    return frechet_distance(distance.real, distance.generated)


def levels_of(size: tuple[int, int]) -> int:
    """Scales at which pictures of `size` (H, W) are seen: 1 at 8 px, 3 at 32, 6 at 256 and above."""
    return min(max(int(math.log2(max(min(size), 1))) - 2, 1), 6)


def _normals(purpose: int, number: int, shape: tuple[int, ...]) -> Tensor:
    generator = np.random.Generator(np.random.Philox(key=np.array([purpose, number], dtype=np.uint64)))
    return torch.from_numpy(generator.standard_normal(shape))


def _unit(filters: Tensor) -> Tensor:
    return filters / filters.flatten(1).norm(dim=1)[:, None, None, None]


def _padded(x: Tensor) -> Tensor:
    return functional.pad(x, (1, 1, 1, 1), mode="replicate")
