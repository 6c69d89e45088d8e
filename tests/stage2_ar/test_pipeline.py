"""The public face of stage two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stage1_vq import VQModel
from stage2_ar import ARPipeline
from taming.errors import ArtifactError, UserError
from tests.conftest import make_pipeline

SEGMENTATION = {"kind": "segmentation", "num_labels": 5, "hidden_width": 8, "label_dim": 4}
CLASS = {"kind": "class", "num_classes": 3}
MAPS = torch.arange(2 * 8 * 8).view(2, 8, 8) % 5


@pytest.fixture
def pipe(tokenizer: VQModel) -> ARPipeline:
    return make_pipeline(tokenizer, SEGMENTATION)


def test_pictures_of_one_condition_lie_side_by_side(pipe: ARPipeline) -> None:
    out = pipe({"segmentation": MAPS}, num_images=3, greedy=True)
    assert out.images.shape == (6, 3, 8, 8)
    assert out.codes.shape == (6, 4, 4)
    assert out.images.abs().max() <= 1
    # Greedy samples of one condition are equal, of two they differ.
    assert torch.equal(out.codes[0], out.codes[2])
    assert not torch.equal(out.codes[0], out.codes[3])
    assert torch.equal(out.images, pipe.tokenizer.decode(out.codes).clamp(-1, 1))


@pytest.mark.parametrize("size", [(8, 8), (12, 20), (4, 16)])
def test_a_seed_means_one_picture_whatever_the_batch_and_the_schedule(
    pipe: ARPipeline, size: tuple[int, int]
) -> None:
    maps = torch.arange(2 * size[0] * size[1]).view(2, *size) % 5
    options: dict[str, Any] = {"height": size[0], "width": size[1], "num_images": 2, "seed": 3}
    whole = pipe({"segmentation": maps}, **options).codes
    assert torch.equal(whole, pipe({"segmentation": maps}, **options, batch_size=1).codes)
    assert torch.equal(whole, pipe({"segmentation": maps}, **options, batch_size=3).codes)
    assert torch.equal(whole, pipe({"segmentation": maps}, **options, schedule="wavefront").codes)
    assert not torch.equal(whole, pipe({"segmentation": maps}, **{**options, "seed": 4}).codes)


@pytest.mark.parametrize("size", [(8, 8), (8, 16)])
def test_known_cells_stay_as_given(pipe: ARPipeline, size: tuple[int, int]) -> None:
    maps = torch.zeros(1, *size, dtype=torch.int64)
    grid = size[0] // 2, size[1] // 2
    codes = torch.randint(0, 16, (1, *grid))
    mask = torch.rand(1, *grid) < 0.5
    out = pipe({"segmentation": maps}, height=size[0], width=size[1], num_images=2, known=(codes, mask)).codes
    assert torch.equal(out[mask.expand(2, -1, -1)], codes.expand(2, -1, -1)[mask.expand(2, -1, -1)])
    free = pipe({"segmentation": maps}, height=size[0], width=size[1], num_images=2).codes
    assert not torch.equal(out, free)


def test_guidance_of_one_is_no_guidance_and_more_changes_the_picture(pipe: ARPipeline) -> None:
    plain = pipe({"segmentation": MAPS}).codes
    assert torch.equal(plain, pipe({"segmentation": MAPS}, guidance_scale=1.0).codes)
    assert not torch.equal(plain, pipe({"segmentation": MAPS}, guidance_scale=4.0).codes)


def test_log_likelihood_is_the_sum_over_the_pictures_codes(pipe: ARPipeline) -> None:
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    codes = pipe.tokenizer.encode(images)
    logits = pipe.model(codes, {"segmentation": MAPS})
    expected = [
        sum(float(logits.detach()[b, n].log_softmax(-1)[codes.flatten(1)[b, n]]) for n in range(16))
        for b in range(2)
    ]
    assert pipe.log_likelihood(images, {"segmentation": MAPS}).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("condition", [SEGMENTATION, CLASS, {"kind": "none"}], ids=lambda c: c["kind"])
@pytest.mark.parametrize("kind", [{}, {"kind": "gpt"}], ids=["llama", "gpt"])
def test_a_saved_pipeline_paints_the_same(
    tokenizer: VQModel, tmp_path: Path, condition: Any, kind: Any
) -> None:
    pipe = make_pipeline(tokenizer, condition, **kind)
    given = {"segmentation": {"segmentation": MAPS}, "class": {"class": [0, 2]}, "none": {}}[
        condition["kind"]
    ]
    pipe.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"transformer", "tokenizer"}
    assert {p.name for p in (tmp_path / "transformer").iterdir()} == {"config.json", "model.safetensors"}
    again = ARPipeline.from_pretrained(tmp_path)
    assert torch.equal(pipe(given, num_images=2).images, again(given, num_images=2).images)


def test_another_tokenizer_is_refused(pipe: ARPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    with torch.no_grad():
        pipe.tokenizer.quantize.codebook[0, 0] += 1  # the buffer is shared with the embedding
        next(pipe.tokenizer.parameters()).view(-1)[0] += 1
    pipe.tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ArtifactError, match="codes mean something else"):
        ARPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("conditions", "options", "message"),
    [
        ({}, {}, "'segmentation' is missing"),
        ({"class": [1]}, {}, "no condition 'class'; it takes 'segmentation'"),
        ({"segmentation": MAPS[:, :4]}, {}, r"needs \(B, 8, 8\)"),
        ({"segmentation": MAPS + 1}, {}, "segmentation label 5 is not one of the 5"),
        ({"segmentation": MAPS.float()}, {}, "whole numbers"),
        (
            {"segmentation": MAPS},
            {"height": 9},
            "height 9 is not a multiple of the downsample factor 2; use 8",
        ),
        ({"segmentation": MAPS}, {"num_images": 0}, "num_images 0"),
        ({"segmentation": MAPS}, {"temperature": 0.0}, "temperature 0"),
        ({"segmentation": MAPS}, {"top_p": 1.5}, r"top_p 1\.5"),
        (
            {"segmentation": MAPS},
            {"known": (torch.zeros(1, 3, 4).long(), torch.ones(1, 3, 4).bool())},
            "known codes",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    pipe: ARPipeline, conditions: Any, options: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pipe(conditions, **options)


def test_half_precision_is_for_the_transformer_alone(pipe: ARPipeline) -> None:
    out = pipe.to(dtype=torch.bfloat16)({"segmentation": MAPS})
    assert out.images.dtype == torch.float32
    assert pipe.model.transformer.token_embedding.weight.dtype == torch.bfloat16


def test_progress_counts_all_cells(pipe: ARPipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipe({"segmentation": MAPS}, num_images=2, batch_size=3, progress=lambda *step: seen.append(step))
    assert seen[-1] == (32, 32)
    assert seen == sorted(seen)


def test_8_bit_weights_are_for_sampling_on_a_cpu_alone(tokenizer: VQModel) -> None:
    pipe = make_pipeline(tokenizer, {**CLASS, "dropout": 0.1})
    exact = pipe({"class": [1]}, num_images=8)
    pipe.to(weights="int8")
    rounded = pipe({"class": [1]}, num_images=8)
    assert rounded.codes.shape == exact.codes.shape
    assert pipe.model.transformer.token_embedding.weight.dtype == torch.float32
    assert torch.equal(pipe.to(weights="full")({"class": [1]}, num_images=8).codes, exact.codes)
    pipe.to(weights="int8")
    with pytest.raises(UserError, match="8-bit weights are for sampling on a CPU, the model is on meta"):
        pipe.to("meta")
    with pytest.raises(UserError, match="weights 'int4' are unknown; choose full or int8"):
        pipe.to(weights="int4")  # type: ignore[arg-type]
