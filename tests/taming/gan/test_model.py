"""GANModel: what a picture depends on, truncation, ways between pictures, and the folder on the disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from taming.config import build_config
from taming.errors import ArtifactError, ConfigError, UserError
from taming.gan import GANModel
from taming.gan.model import GANModelConfig
from taming.gan.sample import sample_noise, slerp

CLASSES = ["ball", "house", "pine"]


def tiny(**changes: Any) -> GANModel:
    """16 px SAGAN of three classes."""
    values = {
        "generator": {"kind": "sagan", "channels": 8, "multipliers": [2, 1, 1], "noise_dim": 12},
        "size": [16, 16],
        "num_classes": 3,
        "class_names": CLASSES,
        **changes,
    }
    torch.manual_seed(0)
    return GANModel(build_config(GANModelConfig, values))


def lively(**changes: Any) -> GANModel:
    """One whose classes, and noise, paint differently: at the start all pictures are nearly grey."""
    model = tiny(**changes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "parametrizations" not in name:
                weight += 0.3 * torch.randn_like(weight)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> GANModel:
    return lively()


def test_a_picture_depends_on_seed_number_and_class_alone(model: GANModel) -> None:
    images = model.sample(7, seed=3, batch_size=4)
    assert images.shape == (7, 3, 16, 16)
    assert images.abs().max() <= 1
    torch.testing.assert_close(model.sample(3, seed=3, first=2, batch_size=1), images[2:5])
    assert not torch.allclose(model.sample(7, seed=4), images)
    others = model.sample(7, seed=3, classes=[1, 1, 1, 1, 1, 1, 1])
    same = [torch.allclose(one, other, atol=1e-5) for one, other in zip(others, images, strict=True)]
    assert same == [i % 3 == 1 for i in range(7)]


def test_sampling_leaves_the_model_as_it_was(model: GANModel) -> None:
    model.train()
    model.generator.stem.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = model.sample(3)
    assert model.generator.trunk.training
    assert not model.generator.stem.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model.eval().sample(3), images)


def test_truncated_noise_is_of_a_truncated_normal() -> None:
    wild = sample_noise(400, 50, seed=5)
    for limit in (0.3, 1.0):
        tame = sample_noise(400, 50, seed=5, truncation=limit)
        assert tame.abs().max() <= limit
        # The variance of a normal that is truncated to [-t, t].
        density = math.exp(-(limit**2) / 2) / math.sqrt(2 * math.pi)
        mass = math.erf(limit / math.sqrt(2))
        assert float(tame.var()) == pytest.approx(1 - 2 * limit * density / mass, rel=0.03)
        assert tame.flatten()[wild.flatten().argsort()].diff().min() >= 0
    torch.testing.assert_close(sample_noise(400, 50, seed=5, truncation=9.0), wild, atol=1e-4, rtol=0)
    torch.testing.assert_close(sample_noise(4, 50, seed=5, first=8), wild[8:12])
    with pytest.raises(UserError, match="truncation 0 is not above 0"):
        sample_noise(1, 2, seed=0, truncation=0)


def test_an_arc_keeps_lengths_and_ends() -> None:
    start, end = (torch.randn(64, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    start, end = start / start.norm(), 3 * end / end.norm()
    way = slerp(start, end, torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(way[[0, 2]], torch.stack((start, end)))
    unit = slerp(start, end / 3, torch.linspace(0, 1, 5))
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(5))
    steps = (unit[1:] * unit[:-1]).sum(1)  # cosines of equal angles
    torch.testing.assert_close(steps, steps[:1].expand(4))
    torch.testing.assert_close(slerp(start, start, torch.tensor([0.5]))[0], start)


def test_a_way_between_pictures_ends_at_them(model: GANModel) -> None:
    way = model.interpolate(5, seed=3, places=(2, 4), classes="pine")
    ends = model.sample(5, seed=3, classes=2)[[2, 4]]
    torch.testing.assert_close(way[[0, -1]], ends, atol=1e-3, rtol=1e-3)
    assert (way[1:] - way[:-1]).abs().amax((1, 2, 3)).min() > 0


def test_a_way_between_classes_ends_at_them(model: GANModel) -> None:
    way = model.interpolate(4, seed=3, places=(1, 1), classes=("ball", 2))
    ends = [model.sample(1, seed=3, first=1, classes=name)[0] for name in (0, 2)]
    torch.testing.assert_close(way[[0, -1]], torch.stack(ends), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(way[1], way[0], atol=1e-3)
    assert not torch.allclose(way[1], way[-1], atol=1e-3)


def test_a_saved_model_paints_the_same(model: GANModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "gan")
    loaded = GANModel.from_pretrained(tmp_path / "gan")
    assert loaded.config == model.config
    assert loaded.content_hash() == model.content_hash()
    assert not loaded.training
    torch.testing.assert_close(loaded.sample(3), model.sample(3))
    with pytest.raises(ArtifactError, match="no folder"):
        GANModel.from_pretrained(tmp_path / "nothing")


def test_a_model_without_classes() -> None:
    model = tiny(num_classes=None, class_names=[])
    assert model.sample(2).shape == (2, 3, 16, 16)
    assert model.interpolate(2).shape == (2, 3, 16, 16)
    with pytest.raises(UserError, match="without classes; leave the class out"):
        model.sample(2, classes=1)


def test_wrong_classes_are_named(model: GANModel) -> None:
    with pytest.raises(UserError, match="no class 'hose': did you mean house"):
        model.sample(1, classes="hose")
    with pytest.raises(
        UserError, match="no class '3': classes are ball, house, pine, or their numbers 0 to 2"
    ):
        model.sample(1, classes=3)
    with pytest.raises(UserError, match="2 classes were given for 3 pictures"):
        model.sample(3, classes=[0, 1])
    with pytest.raises(UserError, match="of which class"):
        model.interpolate(3)
    with pytest.raises(UserError, match="1 frames make no way"):
        model.interpolate(1, classes=0)
    with pytest.raises(UserError, match="0 pictures"):
        model.sample(0)


def test_configs_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="2 class_names for 3 classes"):
        tiny(class_names=["a", "b"])
    with pytest.raises(ConfigError, match="17x16 are not divisible by 4"):
        tiny(size=[17, 16])
