"""The published transformers' logits, greedy codes and pictures, imported and by every way of the pipeline.

The published greedy codes are in the order of writing.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from stage2_ar import ARPipeline
from stage2_ar.conditions.base import crop_prefix
from stage2_ar.conditions.codes import CodesCondition
from stage2_ar.interop.taming_transformers import import_gpt, import_transformer
from stage2_ar.sampling.inference import for_inference
from stage2_ar.sampling.sample import SamplingSettings, picture_uniforms, sample_codes
from stage2_ar.sampling.sliding_window import Schedule, sample_sliding
from stage2_ar.transformer import code_log_likelihood
from taming.types import Prefix
from tests.reference_checkpoint import reference_paths
from tests.stage1_vq.interop.published import small_model

GREEDY = SamplingSettings(greedy=True)
GRID = (8, 8)
NAMES = ("class", "unconditional", "coordinates", "segmentation", "segmentation_unmasked")


@cache
def imported(name: str) -> tuple[ARPipeline, dict[str, Tensor]]:
    """A reference case as a pipeline that was saved and loaded again."""
    checkpoint, config, io = reference_paths(f"transformer_{name}")
    with TemporaryDirectory() as folder:
        import_transformer(checkpoint, config=config).save(Path(folder))
        return ARPipeline.from_pretrained(folder), load_file(io)


def conditions_of(name: str, io: dict[str, Tensor]) -> dict[str, Any]:
    if name == "class":
        return {"class": io["condition"]}
    return {"segmentation": io["condition"]} if name.startswith("segmentation") else {}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_condition_tokens_and_logits(name: str) -> None:
    pipe, io = imported(name)
    conditions = conditions_of(name, io)
    batch = pipe.model.condition.read(conditions) or {"key": ["a", "b"]}
    table = pipe.model.transformer.token_embedding
    assert torch.equal(pipe.model.condition(batch, GRID).embeddings, table(io["condition_tokens"]))
    codes = pipe.tokenizer.encode(io["image"])
    order = pipe.model.transformer.sequence_cells(GRID)
    assert torch.equal(codes.flatten(1)[:, order], io["target_tokens"])
    assert_close(pipe.model(codes, batch)[:, order], io["logits"], atol=1e-4, rtol=0)
    expected = code_log_likelihood(io["logits"], io["target_tokens"])
    assert_close(pipe.log_likelihood(io["image"], conditions), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_greedy_codes_and_pictures(name: str) -> None:
    pipe, io = imported(name)
    conditions = conditions_of(name, io)
    out = pipe(conditions, num_images=1 if conditions else 2, greedy=True)
    order = pipe.model.transformer.sequence_cells(GRID)
    assert torch.equal(out.codes.flatten(1)[:, order], io["greedy_tokens"])
    assert_close(out.images, io["greedy_image"].clamp(-1, 1), atol=1e-4, rtol=0)
    assert_close(pipe.tokenizer.decode(out.codes), io["greedy_image"], atol=1e-4, rtol=0)
    # By each way of computing: plain and packed with the cache, and without it.
    prefix = pipe.model.condition(pipe.model.condition.read(conditions) or {"key": ["a", "b"]}, GRID)
    plain, uniforms = pipe.model.transformer, picture_uniforms(0, 0, 2, 64)
    for transformer, cached in (
        (plain, True),
        (for_inference(plain, torch.float32, 2), True),
        (plain, False),
    ):
        codes = sample_codes(transformer, prefix, None, GRID, uniforms, GREEDY, cached=cached)
        assert torch.equal(codes, out.codes)


@torch.no_grad()
def test_bfloat16_stays_near_the_reference() -> None:
    pipe, io = imported("class")
    prefix = pipe.model.condition({"label": io["condition"]}, GRID)
    logits = for_inference(pipe.model.transformer, torch.bfloat16, 2)(io["target_tokens"], prefix).float()
    error = (logits - io["logits"]).abs()
    assert 0 < float(error.mean()) < 0.03


@pytest.mark.parametrize("schedule", ["serial", "wavefront"])
def test_sliding_window(schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare transformer whose tokenizers are given; the condition's codes are those of the reference."""
    checkpoint, config, io_path = reference_paths("sliding_window")
    io = load_file(io_path)
    quantizer = {"kind": "nearest", "codebook_size": 64, "code_dim": 4}
    maps = small_model(
        resolution=64, attention_resolutions=[], quantizer=quantizer, input="depth", in_channels=1
    )
    pictures = small_model(resolution=64, attention_resolutions=[], quantizer=quantizer)
    pipe = import_transformer(
        checkpoint, config=config, tokenizer=pictures, condition_tokenizer=maps
    ).pipeline
    assert pipe.model.config.grid == (16, 16)
    asked = []

    def encode(condition: CodesCondition, value: Tensor) -> Tensor:
        asked.append(tuple(value.shape))
        return io["condition_tokens"]

    monkeypatch.setattr(CodesCondition, "encode", encode)
    out = pipe({"depth": torch.zeros(1, 1, 80, 96)}, height=80, width=96, greedy=True, schedule=schedule)
    assert torch.equal(out.codes, io["greedy_tokens"])
    assert asked == [(1, 1, 80, 96)]  # one encoding of the whole map


@pytest.mark.slow
def test_a_bare_transformer_and_a_window_of_any_prefix() -> None:
    checkpoint, config, io_path = reference_paths("sliding_window")
    io, size = load_file(io_path), (16, 16)
    model = import_gpt(checkpoint, config=config, grid=size, prefix_length=256)
    condition = io["condition_tokens"]
    grid = (condition.shape[1], condition.shape[2])
    embeddings = model.token_embedding(condition).flatten(1, 2).detach()
    whole = Prefix(embeddings, torch.ones(embeddings.shape[:2], dtype=torch.bool), segments=(grid,))
    codes = sample_sliding(
        model,
        lambda top, left: crop_prefix(whole, top, left, size),
        None,
        grid,
        picture_uniforms(0, 0, 1, grid[0] * grid[1]),
        GREEDY,
    )
    assert torch.equal(codes, io["greedy_tokens"])
