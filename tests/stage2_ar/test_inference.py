"""Copies made for sampling: the same numbers, laid out otherwise; and matrices in 8 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from stage2_ar.sampling.inference import (
    MKLLinear,
    PackedLinear,
    Weights,
    can_pack,
    can_pack_mkl,
    for_inference,
)
from stage2_ar.sampling.quantized_linear import Int8Linear, can_read_int8, dequantize_rows, quantize_rows
from stage2_ar.sampling.sample import SamplingSettings, picture_uniforms, sample_codes
from stage2_ar.transformer import Transformer, build_transformer
from stage2_ar.transformer_config import GPTConfig, LlamaConfig
from taming.types import Prefix
from tests.stage2_ar.small import GRID, VOCABULARY, random_prefix, small_transformer

CELLS = GRID[0] * GRID[1]
CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("rows", [1, 4, 33])
def test_a_copy_computes_the_same(kind: str, rows: int) -> None:
    model, prefix = small_transformer(kind), random_prefix(rows)
    prepared = for_inference(model, torch.float32, rows)
    kinds = {type(module) for module in prepared.modules()}
    if rows == 1:
        assert prepared is model
    elif rows == 4:
        assert (MKLLinear in kinds) == can_pack_mkl(CPU, torch.float32)
    else:
        assert (PackedLinear in kinds) == can_pack(CPU, torch.float32)
    uniforms = picture_uniforms(0, 0, rows, CELLS)
    ours = sample_codes(prepared, prefix, None, GRID, uniforms, SamplingSettings())
    assert torch.equal(ours, sample_codes(model, prefix, None, GRID, uniforms, SamplingSettings()))


def test_another_number_of_rows_works() -> None:
    model, prefix = small_transformer("gpt"), random_prefix(2)
    uniforms = picture_uniforms(0, 0, 2, CELLS)
    ours = sample_codes(
        for_inference(model, torch.float32, 8), prefix, None, GRID, uniforms, SamplingSettings()
    )
    assert torch.equal(ours, sample_codes(model, prefix, None, GRID, uniforms, SamplingSettings()))


@pytest.mark.parametrize("weights", ["full", "int8"])
def test_a_copy_leaves_the_model_as_it_was(weights: Weights) -> None:
    model = small_transformer("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for_inference(model, torch.bfloat16, 2, weights)
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])


def test_a_copy_of_a_model_that_trains_compiled_is_not_compiled() -> None:
    model = small_transformer.__wrapped__("gpt")
    model.compile_blocks()
    assert for_inference(model, torch.float32, 4)._compiled is None
    assert model._compiled is not None


def test_bfloat16_copy_is_close() -> None:
    model, prefix = small_transformer("llama"), random_prefix(2)
    codes = torch.randint(VOCABULARY, (2, CELLS))
    prepared = for_inference(model, torch.bfloat16, 2)
    with torch.no_grad():
        exact: Tensor = model(codes, prefix).log_softmax(-1)
        rounded: Tensor = prepared(codes, prefix).float().log_softmax(-1)
    assert prepared.token_embedding.weight.dtype == torch.bfloat16
    assert 0 < float((exact - rounded).abs().mean()) < 0.1 * float(exact.std())


def test_rows_of_8_bits() -> None:
    weight = torch.randn(6, 32) * torch.tensor([1e-3, 1.0, 50.0, 1.0, 0.0, 1.0])[:, None]
    numbers, scale = quantize_rows(weight)
    error = (dequantize_rows(numbers, scale) - weight).abs()
    assert (error <= scale[:, None] / 2 + 1e-7).all()
    assert numbers[:4].abs().amax(dim=1).tolist() == [127] * 4
    assert torch.equal(dequantize_rows(numbers, scale)[4], torch.zeros(32))


@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_a_linear_in_8_bits(rows: int) -> None:
    linear = nn.Linear(64, 20)
    x = torch.randn(3, rows, 64).bfloat16()
    expected = functional.linear(x.float(), dequantize_rows(*quantize_rows(linear.weight)), linear.bias)
    with torch.inference_mode():
        torch.testing.assert_close(Int8Linear(linear)(x).float(), expected, atol=0.02, rtol=0.02)


def test_rows_of_odd_length_are_not_read_in_8_bits() -> None:
    """torch's kernel would read past their end."""
    assert not can_read_int8(CPU, nn.Linear(40, 16))
    assert can_read_int8(CPU, nn.Linear(64, 13))


def _wide(kind: str) -> tuple[Transformer, Prefix]:
    config: GPTConfig | LlamaConfig = GPTConfig(num_layers=2, num_heads=2, width=32)
    if kind == "llama":
        config = LlamaConfig(num_layers=2, num_heads=2, width=32, mlp_width=64)
    torch.manual_seed(0)
    model = build_transformer(config, vocabulary_size=VOCABULARY, grid=GRID, prefix_length=1).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model, Prefix(torch.randn(2, 1, 32), torch.ones(2, 1, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("rows", [2, 8])
def test_8_bit_copy_is_close_and_samples(kind: str, rows: int) -> None:
    model, prefix = _wide(kind)
    codes = torch.randint(VOCABULARY, (2, CELLS))
    prepared = for_inference(model, torch.float32, rows, "int8")
    assert any(isinstance(module, Int8Linear) for module in prepared.modules()) == (rows == 2)
    with torch.no_grad():
        exact: Tensor = model(codes, prefix).log_softmax(-1)
        rounded: Tensor = prepared(codes, prefix).float().log_softmax(-1)
    assert 0 < float((exact - rounded).abs().mean()) < 0.1 * float(exact.std())
    uniforms = picture_uniforms(0, 0, 2, CELLS)
    drawn = sample_codes(prepared, prefix, None, GRID, uniforms, SamplingSettings())
    assert torch.equal(drawn, sample_codes(prepared, prefix, None, GRID, uniforms, SamplingSettings()))


@pytest.mark.parametrize("weights", ["full", "int8"])
def test_a_copy_with_an_attention_window_samples(weights: Weights) -> None:
    config = LlamaConfig(num_layers=2, num_heads=2, width=32, mlp_width=64, attention_window=(2, 2))
    torch.manual_seed(0)
    model = build_transformer(config, vocabulary_size=VOCABULARY, grid=GRID, prefix_length=1).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    prefix = Prefix(torch.randn(2, 1, 32), torch.ones(2, 1, dtype=torch.bool))
    uniforms = picture_uniforms(0, 0, 2, 48)
    for rows in (2, 8):
        prepared = for_inference(model, torch.float32, rows, weights)
        drawn = sample_codes(prepared, prefix, None, (6, 8), uniforms, SamplingSettings(top_k=9))
        assert drawn.shape == (2, 6, 8)
        if weights == "full":
            expected = sample_codes(model, prefix, None, (6, 8), uniforms, SamplingSettings(top_k=9))
            assert torch.equal(drawn, expected)
        else:
            assert len(drawn.unique()) > 3
