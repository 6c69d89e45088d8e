"""Painting on pictures that are there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from stage1_vq import VQModel
from stage2_ar import ARPipeline
from stage2_ar.animation import filling_frames, save_animation
from stage2_ar.conditions.base import take_rows
from stage2_ar.masks import composite, half_known, soft_mask, touched_cells, variation_known
from stage2_ar.sampling.likelihood import drawn_log_likelihood
from stage2_ar.sampling.sample import SamplingSettings
from stage2_ar.saying import Saying, between
from taming.config import build_config
from taming.errors import UserError
from taming.types import Prefix
from tests.conftest import make_pipeline

CLASS = {"kind": "class", "num_classes": 3}
SEGMENTATION = {"kind": "segmentation", "num_labels": 5, "hidden_width": 8, "label_dim": 4}
LOW = {"kind": "image", "source": "low_resolution", "scale": 4, "hidden_width": 8}


@pytest.fixture
def pipe(tokenizer: VQModel) -> ARPipeline:
    return make_pipeline(tokenizer, CLASS)


def pictures(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.mark.parametrize(
    ("side", "kept"),
    [("upper", (slice(0, 2), slice(None))), ("lower", (slice(2, 4), slice(None))),
     ("left", (slice(None), slice(0, 2))), ("right", (slice(None), slice(2, 4)))],
)  # fmt: skip
def test_completion_keeps_the_codes_of_one_half(pipe: ARPipeline, side: Any, kept: Any) -> None:
    images = pictures(1, 3, 8, 8)
    codes = pipe.encode(images)
    out = pipe.complete(images, side, {"class": [0, 2]}, num_images=2)
    rows, columns = kept
    assert out.codes.shape == (4, 4, 4)
    assert torch.equal(out.codes[:, rows, columns], codes[:, rows, columns].expand(4, -1, -1))
    free = torch.ones(4, 4, dtype=torch.bool)
    free[rows, columns] = False
    assert not torch.equal(out.codes[:, free], codes[:, free].expand(4, -1))
    assert bool((out.ranks[0][~free] == 0).all())
    assert sorted(out.ranks[0][free].tolist()) == list(range(1, 9))


@pytest.mark.parametrize("size", [(8, 8), (8, 20)])
def test_inpainting_changes_cells_of_the_mask_and_no_pixel_outside_of_it(
    pipe: ARPipeline, size: tuple[int, int]
) -> None:
    images = pictures(2, 3, *size)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[3, 2:5] = True  # one row of pixels: two cells
    plain = pipe.inpaint(images, mask, {"class": [0, 1]})
    cells = touched_cells(mask[None], 2)[0]
    assert cells.nonzero().tolist() == [[1, 1], [1, 2]]
    assert torch.equal(plain.codes[:, ~cells], pipe.encode(images)[:, ~cells])
    kept = pipe.inpaint(images, mask, {"class": [0, 1]}, keep_pixels=True, soft_border=1)
    assert torch.equal(kept.codes, plain.codes)
    assert torch.equal(kept.images[:, :, ~mask], images[:, :, ~mask])
    assert not torch.equal(kept.images[:, :, mask], images[:, :, mask])
    assert not torch.equal(plain.images[:, :, ~mask], images[:, :, ~mask])


def test_pictures_and_conditions_go_together(pipe: ARPipeline, tokenizer: VQModel) -> None:
    images, mask = pictures(2, 3, 8, 8), torch.zeros(8, 8, dtype=torch.bool)
    mask[4:, 4:] = True
    both = pipe.inpaint(images, mask, {"class": [0, 2]}, num_images=2).codes
    wanted = pipe.encode(images).repeat_interleave(2, 0)
    known = ~touched_cells(mask[None], 2)[0]
    assert torch.equal(both[:, known], wanted[:, known])
    free = make_pipeline(tokenizer, {"kind": "none"}).inpaint(images, mask, num_images=2).codes
    assert torch.equal(free[:, known], wanted[:, known])
    with pytest.raises(UserError, match="2 pictures were given with 3 conditions"):
        pipe.inpaint(images, mask, {"class": [0, 1, 2]})


def test_outpainting_places_the_picture_in_a_frame(pipe: ARPipeline) -> None:
    images = pictures(1, 3, 8, 8)
    codes = pipe.encode(images)
    out = pipe.outpaint(images, 12, 16, {"class": [1]}, keep_pixels=True)
    assert out.images.shape == (1, 3, 12, 16)
    assert torch.equal(out.codes[:, 1:5, 2:6], codes)
    assert torch.equal(out.images[:, :, 2:10, 4:12], images)
    corner = pipe.outpaint(images, 12, 16, {"class": [1]}, top=4, left=8)
    assert torch.equal(corner.codes[:, 2:, 4:], codes)


def test_variations_paint_a_share_anew(pipe: ARPipeline) -> None:
    images = pictures(1, 3, 8, 8)
    codes = pipe.encode(images)
    out = pipe.vary(images, 0.25, {"class": [1]}, num_images=3)
    assert int((out.ranks[0] > 0).sum()) == 4
    kept = out.ranks[0] == 0
    assert torch.equal(out.codes[:, kept], codes[:, kept].expand(3, -1))
    below = pipe.vary(images, conditions={"class": [1]}, from_row=3)
    assert torch.equal(below.codes[:, :3], codes[:, :3])
    assert bool(variation_known((4, 4), 0.5, 0).sum() == 8)
    assert not torch.equal(variation_known((4, 4), 0.5, 0), variation_known((4, 4), 0.5, 1))


def test_a_low_resolution_becomes_a_picture(tokenizer: VQModel) -> None:
    pipe = make_pipeline(tokenizer, LOW)
    small = pictures(2, 3, 2, 2)
    out = pipe.upscale(small, num_images=2)
    assert out.images.shape == (4, 3, 8, 8)
    assert torch.equal(out.codes, pipe({"image": small}, num_images=2).codes)
    with pytest.raises(UserError, match="low_resolution"):
        make_pipeline(tokenizer, CLASS).upscale(small)


@pytest.mark.parametrize("size", [(8, 8), (8, 16)])
@pytest.mark.parametrize("condition", [CLASS, SEGMENTATION], ids=lambda c: c["kind"])
def test_an_interpolation_begins_and_ends_with_the_pure_conditions(
    tokenizer: VQModel, condition: Any, size: tuple[int, int]
) -> None:
    pipe = make_pipeline(tokenizer, condition)
    if condition is CLASS:
        ends: list[dict[str, Any]] = [{"class": 0}, {"class": 2}]
    else:
        ends = [{"segmentation": torch.full((1, *size), label)} for label in (0, 4)]
    options: dict[str, Any] = {"height": size[0], "width": size[1], "num_images": 2, "seed": 5}
    out = pipe.interpolate(ends[0], ends[1], 4, **options).codes
    assert len(out) == 8
    assert torch.equal(out[:2], pipe(ends[0], **options).codes)
    assert torch.equal(out[-2:], pipe(ends[1], **options).codes)
    assert not torch.equal(out[:2], out[-2:])


def test_between_prefixes_of_different_masks() -> None:
    first = Prefix(torch.zeros(3, 2, 1), torch.tensor([[True, False]]).expand(3, 2))
    second = Prefix(torch.ones(3, 2, 1), torch.ones(3, 2, dtype=torch.bool))
    mixed = between(first, second, torch.tensor([0.0, 0.25, 1.0]))
    assert mixed.mask.tolist() == [[True, False], [True, True], [True, True]]
    assert mixed.embeddings[:, :, 0].tolist() == [[0.0, 1.0], [0.25, 1.0], [1.0, 1.0]]


def test_best_of_keeps_the_most_probable(pipe: ARPipeline) -> None:
    said = {"class": [0, 2]}
    out = pipe(said, num_images=2, best_of=4, guidance_scale=2.0, temperature=0.8)
    assert out.scores is not None
    assert out.scores.shape == (4, 4)
    settings = SamplingSettings(temperature=0.8, guidance_scale=2.0)
    batch = take_rows(pipe.model.condition.read(said), torch.tensor([0, 0, 1, 1]))
    condition = pipe.model.condition
    prefix, null = Saying(batch).prefix(condition, (4, 4)), condition.null(4, (4, 4), "cpu")
    found = drawn_log_likelihood(pipe.model.transformer, prefix, null, out.codes, settings)
    torch.testing.assert_close(found, out.scores.max(1).values, atol=1e-3, rtol=1e-4)
    # The first candidate is the picture without a choice.
    first = pipe(said, num_images=2, guidance_scale=2.0, temperature=0.8)
    chosen_first = out.scores.argmax(1) == 0
    assert torch.equal(out.codes[chosen_first], first.codes[chosen_first])
    assert not torch.equal(out.codes, first.codes)


def test_scores_do_not_depend_on_how_many_are_scored_at_once(
    pipe: ARPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: dict[str, Any] = {"num_images": 2, "best_of": 2, "guidance_scale": 2.0}
    together = pipe({"class": [0, 2]}, **said)
    monkeypatch.setattr("stage2_ar.pipeline.SCORED_LOGITS", 1)
    apart = pipe({"class": [0, 2]}, **said)
    assert together.scores is not None
    assert apart.scores is not None
    torch.testing.assert_close(together.scores, apart.scores)


def test_without_guidance_the_score_is_the_log_likelihood(pipe: ARPipeline) -> None:
    codes = torch.randint(16, (2, 4, 4))
    batch = pipe.model.condition.read({"class": [0, 2]})
    prefix = pipe.model.condition(batch, (4, 4))
    found = drawn_log_likelihood(pipe.model.transformer, prefix, None, codes, SamplingSettings())
    expected = pipe.model(codes, batch).log_softmax(-1).gather(-1, codes.flatten(1)[..., None]).sum((1, 2))
    torch.testing.assert_close(found, expected)


def test_a_scorer_chooses_and_a_larger_picture_is_scored_too(pipe: ARPipeline) -> None:
    def brightness(images: torch.Tensor) -> torch.Tensor:
        return images.mean((1, 2, 3))

    out = pipe({"class": [0]}, num_images=2, best_of=3, scorer=brightness)
    assert out.scores is not None
    torch.testing.assert_close(brightness(out.images), out.scores.max(1).values)
    wide = pipe({"class": [0]}, height=10, width=18, best_of=3).scores
    assert wide is not None
    assert bool((wide < 0).all())
    assert len(wide.unique()) == 3
    for wrong, message in (
        ({"best_of": 0}, "best_of 0"),
        ({"best_of": 2, "greedy": True}, "nothing to choose"),
        ({"scorer": brightness}, "best_of > 1"),
        ({"best_of": 2, "scorer": lambda images: images}, "one number each"),
    ):
        with pytest.raises(UserError, match=message):
            pipe({"class": [0]}, **wrong)


def test_known_cells_first(tokenizer: VQModel) -> None:
    """What is written first sees what is known after it in raster order; a raster model cannot."""
    pipe = make_pipeline(tokenizer, CLASS, target_positions=True)
    torch.nn.init.normal_(pipe.model.transformer.token_embedding.weight, std=2.0)  # codes must matter
    known = torch.zeros(1, 4, 4, dtype=torch.bool)
    known[:, 2:] = True
    codes = torch.randint(16, (1, 4, 4), generator=torch.Generator().manual_seed(0))
    other = codes.clone()
    other[:, 3] = (codes[:, 3] + 1) % 16
    same = [pipe({"class": [0]}, known=(given, known)).codes[:, :2] for given in (codes, other)]
    assert torch.equal(*same)
    with pytest.raises(UserError, match=r"random_order\.end=null"):
        pipe({"class": [0]}, known=(codes, known), known_first=True)
    pipe.model.config = build_config(
        type(pipe.model.config), {**pipe.model.config.model_dump(), "any_order": True}
    )
    out = pipe({"class": [0]}, known=(codes, known))
    assert torch.equal(out.codes[:, 2:], codes[:, 2:])
    changed = pipe({"class": [0]}, known=(other, known)).codes[:, :2]
    assert not torch.equal(out.codes[:, :2], changed)
    assert out.ranks[0, :2].flatten().tolist() == list(range(1, 9))
    forced_off = pipe({"class": [0]}, known=(codes, known), known_first=False).codes
    assert torch.equal(forced_off[:, :2], same[0])


def test_soft_borders_and_compositing() -> None:
    mask = torch.zeros(1, 7, 7, dtype=torch.bool)
    mask[:, 1:6, 1:] = True  # at the picture's right border there is no edge
    share = soft_mask(mask, 1)[0, 0]
    assert share[3].tolist() == [0, 0.5, 1, 1, 1, 1, 1]
    assert share[:, 6].tolist() == [0, 0.5, 1, 1, 1, 0.5, 0]
    assert torch.equal(soft_mask(mask, 0)[0, 0], mask[0].float())
    original, painted = torch.zeros(1, 3, 7, 7), torch.ones(1, 3, 7, 7)
    assert torch.equal(composite(original, painted, mask, 1)[0, 0], share)


def test_frames_fill_in_the_order_of_writing(pipe: ARPipeline, tmp_path: Path) -> None:
    out = pipe.complete(pictures(1, 3, 8, 8), "lower", {"class": [1]})
    frames = out.animation(0, frames=5)
    assert frames.shape == (5, 3, 8, 8)
    assert torch.equal(frames[0, :, 4:], out.images[0, :, 4:])
    assert bool((frames[0, :, :4] == 0).all())
    assert torch.equal(frames[1, :, :2, :4], out.images[0, :, :2, :4])
    assert bool((frames[1, :, :2, 4:] == 0).all())
    assert torch.equal(frames[-1], out.images[0])
    for suffix in ("gif", "webp"):
        save_animation(frames, tmp_path / f"a.{suffix}")
        with Image.open(tmp_path / f"a.{suffix}") as file:
            assert (getattr(file, "n_frames", 1), file.size) == (5, (8, 8))
    with pytest.raises(UserError, match="gif or webp"):
        save_animation(frames, tmp_path / "a.mp4")
    with pytest.raises(UserError, match="2 frames"):
        filling_frames(out.images[0], out.ranks[0], 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, x: p.inpaint(x, torch.ones(8, 9, dtype=torch.bool), {"class": 0}), "8x9 pixels"),
        (lambda p, x: p.inpaint(x, torch.ones(8, 8), {"class": 0}), "give bool"),
        (lambda p, x: p.inpaint(x, torch.zeros(8, 8, dtype=torch.bool), {"class": 0}), "mask is empty"),
        (lambda p, x: p.complete(x, "top", {"class": 0}), "choose upper, lower, left, right"),
        (lambda p, x: p.complete(x[:, :, :7], "upper", {"class": 0}), "height 7 is not divisible"),
        (lambda p, x: p.complete(x, "upper", {"class": 0}, soft_border=-1), "soft border -1"),
        (lambda p, x: p.outpaint(x, 8, 8, {"class": 0}), "not larger than the picture"),
        (lambda p, x: p.outpaint(x, 8, 13, {"class": 0}), "width 13 is not divisible"),
        (lambda p, x: p.outpaint(x, 8, 12, {"class": 0}, left=3), "left 3"),
        (lambda p, x: p.vary(x, 0.0, {"class": 0}), "strength 0.0"),
        (lambda p, x: p.vary(x, conditions={"class": 0}, from_row=4), "row 4"),
        (lambda p, x: p.interpolate({"class": 0}, {"class": 1}, 1), "at least 2 steps"),
        (lambda p, x: p.interpolate({"class": [0, 1]}, {"class": 1}), "one row of each"),
        (lambda p, x: p({"class": 0}, guidance_schedule="cubic"), "choose constant, linear, cosine"),
        (lambda p, x: p({"class": 0}, guidance_power=0.0), "guidance_power 0.0"),
        (lambda p, x: p({"class": 0}, tile=-2), "tile -2"),
    ],
)
def test_what_does_not_fit_is_refused(pipe: ARPipeline, call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(pipe, pictures(1, 3, 8, 8))


def test_halves_of_odd_grids() -> None:
    assert int(half_known("upper", (5, 3)).sum()) == 6
    assert int(half_known("right", (5, 3)).sum()) == 5
    with pytest.raises(UserError, match="no upper half"):
        half_known("upper", (1, 3))


def test_guidance_on_a_schedule(pipe: ARPipeline) -> None:
    settings = SamplingSettings(guidance_scale=3.0, guidance_schedule="linear", guidance_start=1.0)
    assert [settings.scale_of(n, 5) for n in range(5)] == [1.0, 1.5, 2.0, 2.5, 3.0]
    cosine = replace(settings, guidance_schedule="cosine")
    assert cosine.scale_of(0, 5) == 1
    assert cosine.scale_of(4, 5) == 3
    assert cosine.scale_of(2, 5) == pytest.approx(2)
    assert replace(cosine, guidance_power=3.0).scale_of(2, 5) < 1.2
    assert replace(settings, guidance_schedule="constant").scale_of(0, 5) == 3
    # A schedule without any way to go is the constant.
    constant = pipe({"class": [0, 2]}, guidance_scale=2.5).codes
    flat: dict[str, Any] = {"guidance_scale": 2.5, "guidance_start": 2.5}
    assert torch.equal(constant, pipe({"class": [0, 2]}, guidance_schedule="linear", **flat).codes)
    risen = pipe({"class": [0, 2]}, guidance_schedule="linear", guidance_scale=2.5).codes
    assert not torch.equal(constant, risen)
    # The first cell is that of guidance at its start.
    assert torch.equal(risen[:, 0, 0], pipe({"class": [0, 2]}).codes[:, 0, 0])


@pytest.mark.parametrize("schedule", ["serial", "wavefront"])
@pytest.mark.parametrize("windowed", [False, True])
def test_scheduled_guidance_is_one_picture_by_every_schedule(
    tokenizer: VQModel, schedule: Any, windowed: bool
) -> None:
    changes = {"attention_window": (1, 2)} if windowed else {}
    pipe = make_pipeline(tokenizer, CLASS, **changes)
    options: dict[str, Any] = {
        "height": 12, "width": 16, "guidance_scale": 3.0, "guidance_schedule": "cosine", "best_of": 2,
    }  # fmt: skip
    out = pipe({"class": [0, 2]}, **options, schedule=schedule)
    assert torch.equal(out.codes, pipe({"class": [0, 2]}, **options, batch_size=1).codes)
    assert out.scores is not None
    assert out.scores.shape == (2, 2)


def test_tiles_do_not_change_a_picture(pipe: ARPipeline) -> None:
    whole, tiled = (pipe({"class": [0]}, tile=tile, height=12, width=20) for tile in (0, 4))
    assert torch.equal(whole.codes, tiled.codes)
    torch.testing.assert_close(whole.images, tiled.images, atol=2e-5, rtol=1e-4)
