"""The distance over untrained features: what it notices, and that it is the same however it is computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from taming.data.config import ScenesDataConfig
from taming.data.dataset import open_dataset
from taming.errors import UserError
from taming.metrics.feature_distance import (
    FEATURES,
    FeatureDistance,
    RandomFeatures,
    feature_distance,
    levels_of,
)
from taming.metrics.frechet import FeatureMoments
from tests.ranks import run_ranks

SIZE, COUNT = 16, 200
GOLDEN = [-0.0189, 1.97953, 2.54756, -2.38004]


@pytest.fixture(scope="module")
def scenes() -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, 16, 16) in [-1, 1] and their classes (N,)."""
    dataset = open_dataset(ScenesDataConfig(size=SIZE, num_train=3 * COUNT), "train")
    batch = dataset.batch(range(3 * COUNT), [-1] * (3 * COUNT))
    return batch["image"].float() / 127.5 - 1, batch["label"]


def test_it_rises_with_what_is_wrong(scenes: tuple[Tensor, Tensor]) -> None:
    images, labels = scenes
    real, other = images[:COUNT], images[COUNT : 2 * COUNT]
    floor = feature_distance(real, other)
    kernel = torch.ones(1, 1, 3, 3) / 9
    blurred = functional.conv2d(
        functional.pad(other, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None], kernel
    )
    noise = torch.randn(other.shape, generator=torch.Generator().manual_seed(0))
    few_classes = images[COUNT:][labels[COUNT:] == 0]
    assert feature_distance(real, blurred.view_as(other)) > 2 * floor
    assert feature_distance(real, few_classes) > 2 * feature_distance(real, other[: len(few_classes)])
    faint, strong = (feature_distance(real, other + amount * noise) for amount in (0.2, 0.6))
    assert 1.5 * floor < faint < strong
    assert feature_distance(real, 0.1 * noise) > 30 * floor
    assert feature_distance(real, other.flip(2)) > 10 * floor
    assert feature_distance(real, real) < 1e-8


def test_it_does_not_depend_on_batches(scenes: tuple[Tensor, Tensor]) -> None:
    images, _ = scenes
    real, other = images[:50], images[50:100]
    one, two = (feature_distance(real, other, batch_size=size) for size in (7, 50))
    assert one == pytest.approx(two, rel=1e-5)


def test_moments_of_processes_add_up(scenes: tuple[Tensor, Tensor]) -> None:
    rows = RandomFeatures(levels=2)(scenes[0][:40])
    together, apart, other = FeatureMoments(FEATURES), FeatureMoments(FEATURES), FeatureMoments(FEATURES)
    together.add(rows)
    apart.add(rows[:30])
    other.add(rows[30:])
    apart.merge(other.packed())
    assert apart.count == 40
    torch.testing.assert_close(apart.mean, together.mean)
    torch.testing.assert_close(apart.covariance, together.covariance)


def _of_share(rank: int, images: Tensor) -> float:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    distance = FeatureDistance((SIZE, SIZE))
    real, other = images.chunk(2)
    # Shares of unequal size, and one process without real pictures.
    if rank == 0:
        distance.add_real(real)
    distance.add_generated(other[:5] if rank == 0 else other[5:])
    return distance.value()


@pytest.mark.slow
def test_processes_see_the_pictures_of_all(scenes: tuple[Tensor, Tensor]) -> None:
    images = scenes[0][:40]
    wanted = feature_distance(*images.chunk(2))
    for outcome in run_ranks(_of_share, 2, images):
        assert outcome.error is None
        assert outcome.result == pytest.approx(wanted, rel=1e-5)


def test_features_are_those_of_earlier_versions() -> None:
    ramp = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    features = RandomFeatures(levels=2)(ramp)[0]
    assert features[:4].tolist() == pytest.approx(GOLDEN, abs=1e-4)
    grey = RandomFeatures(channels=1, levels=1)(torch.zeros(2, 1, 9, 8))
    assert grey.shape == (2, FEATURES)


def test_scales_follow_the_size() -> None:
    assert [levels_of((side, side)) for side in (8, 16, 32, 64, 256, 1024)] == [1, 2, 3, 4, 6, 6]
    assert levels_of((16, 64)) == 2


def test_what_cannot_be_measured_says_so() -> None:
    distance = FeatureDistance((8, 8))
    with pytest.raises(UserError, match=r"\(B, 3, H, W\) with sides of 4 pixels"):
        distance.add_real(torch.zeros(2, 1, 8, 8))
    distance.add_real(torch.rand(4, 3, 8, 8))
    with pytest.raises(UserError, match="two pictures or more, not 0"):
        distance.value()
    distance.add_generated(torch.full((2, 3, 8, 8), float("nan")))
    with pytest.raises(UserError, match="diverged"):
        distance.value()
