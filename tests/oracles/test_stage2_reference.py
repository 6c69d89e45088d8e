"""The published transformers' logits and greedy codes, by every way of ours."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from stage2_ar.conditions import Condition, build_condition, crop_prefix
from stage2_ar.conditions.config import ClassConditionConfig, NoConditionConfig
from stage2_ar.inference import for_inference
from stage2_ar.sampling import SamplingSettings, picture_uniforms, sample_codes
from stage2_ar.sliding_window import sample_sliding
from stage2_ar.transformer import Transformer
from taming.types import Batch, Prefix
from tests.reference_checkpoint import load_reference
from tests.stage2_ar.published_gpt import build_published

GREEDY = SamplingSettings(greedy=True)


def _load(name: str) -> tuple[Transformer, Condition, Batch, dict[str, Tensor]]:
    config, state, io = load_reference(name)
    params: dict[str, Any] = config["model"]["params"]["transformer_config"]["params"]
    weights = {k.removeprefix("transformer."): v for k, v in state.items() if k.startswith("transformer.")}
    model = build_published(params, weights, (8, 8), 1)
    condition: Condition
    if name == "transformer_class":
        num_classes = config["model"]["params"]["cond_stage_config"]["params"]["n_classes"]
        kind: Any = ClassConditionConfig(num_classes=num_classes, shared_vocabulary=True)
        batch: Batch = {"label": io["condition"]}
    else:
        kind = NoConditionConfig(start_token=config["model"]["params"]["sos_token"])
        batch = {"image": io["image"]}
    condition = build_condition(kind, width=params["n_embd"], downsample_factor=2)
    condition.attach(model.token_embedding)
    return model, condition.eval(), batch, io


@pytest.mark.parametrize("name", ["transformer_class", "transformer_unconditional"])
def test_logits_and_greedy_codes(name: str) -> None:
    model, condition, batch, io = _load(name)
    with torch.no_grad():
        prefix = condition(batch, (8, 8))
        logits = model(io["target_tokens"], prefix)
    torch.testing.assert_close(logits, io["logits"], atol=1e-4, rtol=0)
    uniforms = picture_uniforms(0, 0, 2, 64)
    for prepared in (model, for_inference(model, torch.float32, 2)):
        codes = sample_codes(prepared, prefix, None, (8, 8), uniforms, GREEDY)
        assert torch.equal(codes.flatten(1), io["greedy_tokens"])
    codes = sample_codes(model, prefix, None, (8, 8), uniforms, GREEDY, cached=False)
    assert torch.equal(codes.flatten(1), io["greedy_tokens"])


def test_bfloat16_stays_near_the_reference() -> None:
    model, condition, batch, io = _load("transformer_class")
    with torch.no_grad():
        prefix = condition(batch, (8, 8))
        logits = for_inference(model, torch.bfloat16, 2)(io["target_tokens"], prefix).float()
    error = (logits - io["logits"]).abs()
    assert 0 < float(error.mean()) < 0.03


@pytest.mark.parametrize("schedule", ["serial", "wavefront"])
def test_sliding_window(schedule: Literal["serial", "wavefront"]) -> None:
    config, state, io = load_reference("sliding_window")
    window = config["window"]
    weights = {key.removeprefix("transformer."): value for key, value in state.items()}
    model = build_published(config["model"]["params"], weights, (window, window), window * window)
    condition = io["condition_tokens"]
    grid = (condition.shape[1], condition.shape[2])
    embeddings = model.token_embedding(condition).flatten(1, 2).detach()
    whole = Prefix(embeddings, torch.ones(embeddings.shape[:2], dtype=torch.bool), segments=(grid,))
    codes = sample_sliding(
        model,
        lambda top, left: crop_prefix(whole, top, left, (window, window)),
        None,
        grid,
        picture_uniforms(0, 0, 1, grid[0] * grid[1]),
        GREEDY,
        schedule=schedule,
    )
    assert torch.equal(codes, io["greedy_tokens"])
