"""`taming gan eval`: figures of a tiny generator, how they are written down, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from taming.data.config import ScenesDataConfig
from taming.data.dataset import open_dataset
from taming.data.scenes import CLASS_NAMES
from taming.errors import UserError
from taming.gan.cli import app
from taming.gan.evaluate import evaluate_gan
from taming.gan.model import GANModel
from taming.metrics.fidelity import Pictures8Bit, fidelity
from taming.metrics.frechet import FeatureMoments, frechet_distance
from taming.metrics.inception import FEATURES, InceptionFeatures
from tests.taming.gan.test_model import lively, tiny


@pytest.fixture(scope="module")
def model() -> GANModel:
    return lively(num_classes=5, class_names=CLASS_NAMES)


@pytest.fixture(scope="module")
def saved(model: GANModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gan") / "model"
    model.save_pretrained(folder)
    return folder


def evaluate(saved: Path, data: Any, *options: Any) -> None:
    result = CliRunner().invoke(app, ["eval", str(saved), str(data), "--device", "cpu", *map(str, options)])
    if result.exception is not None:
        raise result.exception


def test_figures_do_not_depend_on_batches(model: GANModel) -> None:
    data = open_dataset(ScenesDataConfig(size=16, num_validation=12), "validation")
    found, again = (evaluate_gan(model, data, num=20, batch_size=size) for size in (20, 7))
    assert found["pictures"] == 20
    assert found["real_pictures"] == 12
    assert found["feature_distance"] > 1
    assert found["patch_distance"] == found["patch_distance_16"] > 0
    assert again["feature_distance"] == pytest.approx(found["feature_distance"], rel=1e-3)
    assert evaluate_gan(model, data, seed=1)["feature_distance"] != found["feature_distance"]


def test_the_command_writes_figures_and_a_sheet(saved: Path, tmp_path: Path) -> None:
    options = ("-o", "num_validation=6", "-o", "num_train=8", "--num", 5, "--truncation", 0.7)
    evaluate(saved, "scenes", "--out", tmp_path / "out", *options)
    facts = json.loads((tmp_path / "out/metrics.json").read_text())
    assert facts["pictures"] == 5
    assert facts["real_pictures"] == 6
    assert facts["truncation"] == 0.7
    assert facts["size"] == [16, 16]
    assert facts["model_hash"] == GANModel.from_pretrained(saved).content_hash()
    assert (tmp_path / "out/sheet.png").is_file()


def test_mistakes_are_named_before_any_work(saved: Path, tmp_path: Path) -> None:
    small = ("-o", "num_validation=4")
    for data, options, message in (
        ("scenes", (*small, "-o", "size=32"), r"16x16, the data's are 32x32: set -o size=\[16,16\]"),
        ("scenes", (*small, "--truncation", 0), "truncation 0.0 is not above 0"),
        ("scenes", (*small, "--fid", "--inception-weights", tmp_path / "no.pth"), "no.pth cannot be read"),
        ("nowhere", (), "no data at 'nowhere'"),
        ("scenes", ("-o", "num_validation=1"), "1 picture is no set"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(saved, data, *options)


def test_classes_must_be_those_of_the_data(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "three")
    tiny(num_classes=None, class_names=[]).save_pretrained(tmp_path / "none")
    for name, message in (("three", "are not the model's"), ("none", "trained without classes")):
        with pytest.raises(UserError, match=message):
            evaluate(tmp_path / name, "scenes", "-o", "num_validation=4", "--classes")


@pytest.mark.slow
def test_classes_are_judged(saved: Path, tmp_path: Path) -> None:
    options = ("-o", "num_validation=60", "-o", "num_train=1000", "--classes", "--out", tmp_path / "out")
    evaluate(saved, "scenes", *options)
    facts = json.loads((tmp_path / "out/metrics.json").read_text())
    assert facts["class_accuracy_chance"] == 0.2
    assert facts["class_accuracy_real"] > 0.7
    assert facts["class_accuracy"] < 0.5


@pytest.fixture
def inception(tmp_path: Path) -> Path:
    """A file of Inception's weights, at random: the published ones would have to be downloaded."""
    package = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    with (
        mock.patch.object(package, "load_state_dict_from_url", return_value={}),
        mock.patch.object(torch.nn.Module, "load_state_dict"),
    ):
        network = package.FeatureExtractorInceptionV3("inception", ["2048"])
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


@pytest.mark.slow
def test_fid_is_that_of_torch_fidelity(inception: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.rand(2, 12, 3, 20, 20, generator=generator) * 2 - 1
    generated = generated * torch.linspace(0.2, 1, 20)
    figures = fidelity(
        Pictures8Bit(lambda i: generated[i], 12), Pictures8Bit(lambda i: real[i], 12), weights=inception
    )
    features = InceptionFeatures(inception)
    moments = FeatureMoments(FEATURES), FeatureMoments(FEATURES)
    for found, images in zip(moments, (generated, real), strict=True):
        found.add(features(images))
    assert figures["fid"] == pytest.approx(frechet_distance(*moments), rel=1e-3)
    assert figures["inception_score"] >= 1
    assert figures["kid_std"] >= 0


@pytest.mark.slow
def test_the_command_measures_fid_is_and_kid(saved: Path, inception: Path, tmp_path: Path) -> None:
    options = ("-o", "num_validation=6", "--num", 8, "--fid", "--inception-weights", inception)
    evaluate(saved, "scenes", *options, "--out", tmp_path / "out")
    facts = json.loads((tmp_path / "out/metrics.json").read_text())
    assert facts["fid"] > 0
    assert {"inception_score", "inception_score_std", "kid", "kid_std"} <= facts.keys()
    assert facts["kid_subset_size"] == 6
    assert "Inception" in facts["fid_extractor"]
