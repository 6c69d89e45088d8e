"""Evaluation: perceptual figures where they mean something, what is said about them, and the sheet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stage1_vq import VQModel
from stage1_vq.config import VQModelConfig
from stage1_vq.evaluate import Evaluation, evaluate_tokenizer, protocol, write_rows
from stage1_vq.sheet import choose_examples, survival_sheet
from taming.config import build_config
from taming.data.config import FolderDataConfig, ScenesDataConfig
from taming.data.dataset import open_dataset
from taming.errors import UserError
from taming.metrics.lpips import PerceptualDistance
from taming.metrics.psnr import psnr
from tests.conftest import TINY_MODEL

DATA = ScenesDataConfig(size=16, num_train=1, num_validation=7)


class MeanColours(nn.Module):
    """Stands in for Inception: as many features, of which only a few vary."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.pad(images.mean((2, 3)), (0, 2045))


def made(kind: str = "image", in_channels: int = 3) -> VQModel:
    torch.manual_seed(0)
    values: dict[str, Any] = {**TINY_MODEL, "input": kind, "in_channels": in_channels}
    return VQModel(build_config(VQModelConfig, values)).eval()


@pytest.fixture(scope="module")
def lpips() -> PerceptualDistance:
    return PerceptualDistance(random_weights=True)


def test_perceptual_figures_are_means_over_pictures(tokenizer: VQModel, lpips: PerceptualDistance) -> None:
    dataset = open_dataset(DATA, "validation")
    found = evaluate_tokenizer(tokenizer, dataset, batch_size=3, lpips=lpips, inception=MeanColours())
    assert tuple(found.rows) == ("psnr", "ssim", "l1", "lpips")
    images = dataset.batch([4], [-1])["image"].float() / 127.5 - 1
    painted = tokenizer.decode(tokenizer.encode(images)).clamp(-1, 1)
    assert found.rows["lpips"][4] == pytest.approx(float(lpips(painted, images)), rel=1e-4)
    assert found.rows["psnr"][4] == pytest.approx(float(psnr(painted, images)), rel=1e-4)
    for name, values in found.rows.items():
        assert found.figures[name] == pytest.approx(sum(values) / 7, rel=1e-5)
    everything = dataset.batch(range(7), [-1] * 7)["image"].float() / 127.5 - 1
    repainted = tokenizer.decode(tokenizer.encode(everything)).clamp(-1, 1)
    apart = (repainted.mean((0, 2, 3)) - everything.mean((0, 2, 3))).square().sum()
    assert found.figures["reconstruction_fid"] >= float(apart) - 1e-6


@pytest.mark.parametrize(("kind", "channels"), [("segmentation", 7), ("image", 4)])
def test_networks_for_pictures_are_not_asked_about_others(
    kind: str, channels: int, lpips: PerceptualDistance
) -> None:
    dataset = open_dataset(DATA, "validation")
    with pytest.raises(UserError, match=f"--fid looks at pictures of 1 or 3 channels; .* of {kind}"):
        evaluate_tokenizer(made(kind, channels), dataset, inception=MeanColours())
    with pytest.raises(UserError, match="--lpips looks at pictures"):
        evaluate_tokenizer(made(kind, channels), dataset, lpips=lpips)


def test_the_protocol_is_stated(tokenizer: VQModel) -> None:
    folder = FolderDataConfig(root=Path("x"), size=[16, 24], resize=20)
    stated = protocol(folder, tokenizer.config, "all", lpips=True, fid=True)
    assert stated["resize"] == "shorter side to 20 pixels, bicubic, antialiased"
    assert stated["size"] == [16, 24]
    assert "torch-fidelity" in stated["fid_extractor"]
    assert "VGG16" in stated["lpips_network"]
    labels = protocol(folder, made("segmentation", 7).config, "train", lpips=False, fid=False)
    assert labels["resize"].endswith("nearest")
    assert "fid_extractor" not in labels


def test_examples_are_the_best_the_middle_and_the_worst() -> None:
    values = [float(n) for n in range(20)]
    assert choose_examples(values) == {
        "best": [19, 18, 17, 16],
        "median": [11, 10, 9, 8],
        "worst": [3, 2, 1, 0],
    }
    assert choose_examples([1.0]) == {"best": [0]}
    assert choose_examples([1.0, 2.0]) == {"best": [1], "worst": [0]}
    assert choose_examples([1.0, 3.0, 2.0]) == {"best": [1], "median": [2], "worst": [0]}
    for count in range(1, 15):
        chosen = [place for places in choose_examples(values[:count]).values() for place in places]
        assert len(set(chosen)) == len(chosen)


@pytest.mark.parametrize(("kind", "channels"), [("image", 3), ("segmentation", 7), ("edges", 1)])
def test_a_sheet_shows_all_groups(kind: str, channels: int) -> None:
    model, dataset = made(kind, channels), open_dataset(DATA, "validation")
    sheet = survival_sheet(model, dataset, evaluate_tokenizer(model, dataset))
    # Three groups of two pictures of 16x16, enlarged by 8, over their reconstructions.
    assert sheet.shape == (3, 3 * (24 + 2 * 128 + 32 + 8) + 8, 2 * (128 + 8) + 8)
    assert sheet.unique().numel() > 3


def test_rows_are_written_as_a_table(tmp_path: Path) -> None:
    write_rows(Evaluation({}, ["a/1", 'b,"2'], {"psnr": [1.5, 2], "l1": [0.1, 0.2]}), tmp_path / "p.csv")
    lines = (tmp_path / "p.csv").read_text().splitlines()
    assert lines == ["key,psnr,l1", "a/1,1.5,0.1", '"b,""2",2,0.2']
