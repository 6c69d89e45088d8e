"""The transformer: causality, prefixes, positions, initial values, and tiny models of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel
from transformers import LlamaConfig as TheirLlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from stage2_ar.attention import _causal_with_matrix
from stage2_ar.transformer import (
    Block,
    Transformer,
    build_transformer,
    code_log_likelihood,
    next_code_loss,
    weight_decay_groups,
)
from stage2_ar.transformer_config import GPTConfig, LlamaConfig
from taming.config import build_config
from taming.errors import ConfigError, UserError
from taming.types import Prefix
from tests.stage2_ar.small import CONFIGS, GRID, VOCABULARY, random_prefix, small_transformer


@pytest.mark.parametrize("kind", CONFIGS)
@given(changed=st.integers(0, 11), seed=st.integers(0, 5))
@settings(max_examples=10, deadline=None)
def test_a_later_code_never_changes_an_earlier_prediction(kind: str, changed: int, seed: int) -> None:
    model = small_transformer(kind)
    prefix = random_prefix(2, seed=seed)
    codes = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(seed))
    other = codes.clone()
    other[:, changed] = (other[:, changed] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = model(codes, prefix), model(other, prefix)
    # The prediction of the changed cell itself does not see it either.
    torch.testing.assert_close(before[:, : changed + 1], after[:, : changed + 1])
    if changed < 11:
        assert not torch.allclose(before[:, changed + 1], after[:, changed + 1])


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_masked_prefix_position_is_seen_by_nobody(kind: str) -> None:
    model = small_transformer(kind)
    prefix = random_prefix(2)
    mask = prefix.mask.clone()
    mask[1, 0] = False
    codes = torch.randint(VOCABULARY, (2, 12))
    changed = prefix.embeddings.clone()
    changed[:, 0] *= -1
    with torch.no_grad():
        before = model(codes, Prefix(prefix.embeddings, mask, prefix.cells))
        after = model(codes, Prefix(changed, mask, prefix.cells))
    assert torch.isfinite(before).all()
    torch.testing.assert_close(before[1], after[1])
    assert not torch.allclose(before[0], after[0])


def test_unmasked_prefix_sees_itself_fully() -> None:
    codes = torch.randint(VOCABULARY, (1, 12))
    prefix = random_prefix(1)
    outputs = []
    for num_unmasked in (0, 1, 3):
        torch.manual_seed(0)
        config = GPTConfig(num_layers=2, num_heads=2, width=16, num_unmasked=num_unmasked)
        model = build_transformer(config, vocabulary_size=VOCABULARY, grid=GRID, prefix_length=3).eval()
        torch.nn.init.normal_(model.head.weight)
        outputs.append(model(codes, prefix))
    torch.testing.assert_close(outputs[0], outputs[1])  # a single position sees itself anyway
    assert not torch.allclose(outputs[0], outputs[2])


@pytest.mark.parametrize("kind", CONFIGS)
def test_cells_are_added_to_the_input_that_predicts_them(kind: str) -> None:
    model = small_transformer(kind)
    prefix = random_prefix(1)
    assert prefix.cells is not None
    codes = torch.randint(VOCABULARY, (1, 12))
    cells = prefix.cells.clone()
    cells[:, 1, 1] *= -1  # cell 5 of the 3 x 4 grid
    with torch.no_grad():
        before = model(codes, prefix)
        after = model(codes, Prefix(prefix.embeddings, prefix.mask, cells))
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5], after[:, 5])


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_smaller_grid_keeps_the_positions_of_its_cells(kind: str) -> None:
    model = small_transformer(kind)
    prefix = random_prefix(1)
    whole, part = model.positions(prefix, GRID), model.positions(prefix, (2, 3))
    places = torch.tensor([0, 1, 2, 3, 4, 5, 7, 8, 9])  # three prefix positions, then rows of 4 cut to 3
    for larger, smaller in ((whole.embedding, part.embedding), (whole.rotation, part.rotation)):
        if isinstance(larger, tuple) and isinstance(smaller, tuple):
            assert torch.equal(larger[0][places], smaller[0])
            assert torch.equal(larger[1][places], smaller[1])
        elif larger is not None and not isinstance(larger, tuple):
            assert torch.equal(larger[places], smaller)
    with pytest.raises(UserError, match="sliding window"):
        model.positions(prefix, (4, 4))


def test_rotary_prefix_is_the_identity_unless_it_has_a_grid() -> None:
    model = small_transformer("llama")
    plain = model.positions(random_prefix(1), GRID).rotation
    assert plain is not None
    assert torch.equal(plain[0][:3], torch.ones_like(plain[0][:3]))
    assert torch.equal(plain[1][:3], torch.zeros_like(plain[1][:3]))
    embeddings = torch.randn(1, 12, 16)
    gridded = Prefix(embeddings, torch.ones(1, 12, dtype=torch.bool), segments=(GRID,))
    rotation = model.positions(gridded, GRID).rotation
    assert rotation is not None
    assert torch.equal(rotation[0][:12], rotation[0][12:])  # a condition's cell lies where the code's does


def test_llama_survives_a_meta_device() -> None:
    source = small_transformer("llama")
    with torch.device("meta"):
        loaded = Transformer(source.config, vocabulary_size=VOCABULARY, grid=GRID, prefix_length=3)
    loaded.load_state_dict(source.state_dict(), assign=True)
    codes, prefix = torch.randint(VOCABULARY, (1, 12)), random_prefix(1)
    torch.testing.assert_close(loaded.eval()(codes, prefix), source(codes, prefix))


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_parameter_learns(kind: str) -> None:
    model = small_transformer(kind).train()
    codes = torch.randint(VOCABULARY, (2, 12))
    next_code_loss(model(codes, random_prefix(2)), codes).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing
    model.eval()


@pytest.mark.parametrize("kind", CONFIGS)
def test_dropouts_work_in_training_only(kind: str) -> None:
    names = ("embedding_dropout", "attention_dropout", "residual_dropout")
    codes, prefix = torch.randint(VOCABULARY, (1, 12)), random_prefix(1)
    for name in names:
        config = CONFIGS[kind].model_copy(update={name: 0.5})
        model = build_transformer(config, vocabulary_size=VOCABULARY, grid=GRID, prefix_length=3)
        torch.nn.init.normal_(model.head.weight)
        assert not torch.allclose(model(codes, prefix), model(codes, prefix)), name
        model.eval()
        torch.testing.assert_close(model(codes, prefix), model(codes, prefix))


def test_loss_and_likelihood_agree() -> None:
    logits, codes = torch.randn(3, 7, 11), torch.randint(11, (3, 7))
    by_hand = torch.stack(
        [
            sum((logits[b, n].log_softmax(-1)[codes[b, n]] for n in range(7)), torch.zeros(()))
            for b in range(3)
        ]
    )
    torch.testing.assert_close(code_log_likelihood(logits, codes), by_hand)
    torch.testing.assert_close(next_code_loss(logits, codes), -by_hand.sum() / 21)


def test_only_matrices_decay() -> None:
    model = small_transformer("gpt")
    decayed, others = weight_decay_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}

    def named(group: dict[str, Any]) -> set[str]:
        return {names[id(p)] for p in group["params"]}

    assert named(decayed) | named(others) == set(names.values())
    assert not named(decayed) & named(others)
    assert {"token_embedding.weight", "position_embedding", "norm.weight"} <= named(others)
    assert all(name.endswith("weight") and "norm" not in name for name in named(decayed))
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_initial_values() -> None:
    model = build_transformer(
        GPTConfig(num_layers=2, num_heads=2, width=64), vocabulary_size=200, grid=(8, 8), prefix_length=1
    )
    for name in ("token_embedding.weight", "blocks.0.attention.qkv.weight", "blocks.1.mlp.down.weight"):
        assert float(model.get_parameter(name).detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not model.get_parameter("blocks.0.attention.qkv.bias").any()
    config = LlamaConfig(num_layers=2, num_heads=2, width=64, zero_init_head=True)
    llama = build_transformer(config, vocabulary_size=200, grid=(8, 8), prefix_length=1)
    assert not llama.head.weight.any()


def test_configs_refuse_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="not divisible by num_heads"):
        build_config(GPTConfig, {"width": 30, "num_heads": 4})
    with pytest.raises(ConfigError, match="rotary"):
        build_config(LlamaConfig, {"width": 12, "num_heads": 2})
    with pytest.raises(ConfigError, match="block_size 5 is smaller"):
        build_transformer(
            GPTConfig(num_layers=1, num_heads=1, width=4, block_size=5),
            vocabulary_size=3,
            grid=(4, 4),
            prefix_length=1,
        )
    with pytest.raises(ConfigError, match="table_size"):
        build_transformer(
            GPTConfig(num_layers=1, num_heads=1, width=4, table_size=5),
            vocabulary_size=8,
            grid=(2, 2),
            prefix_length=1,
        )


def test_table_may_be_larger_than_the_vocabulary() -> None:
    config = GPTConfig(num_layers=1, num_heads=1, width=8, table_size=20)
    model = build_transformer(config, vocabulary_size=8, grid=(2, 2), prefix_length=1).eval()
    prefix = Prefix(torch.randn(1, 1, 8), torch.ones(1, 1, dtype=torch.bool))
    assert model.head.weight.shape == (20, 8)
    assert model(torch.randint(8, (1, 4)), prefix).shape == (1, 4, 8)


def test_gpt_equals_transformers_gpt2() -> None:
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, activation_function="gelu",
            tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
        )
    ).eval()  # fmt: skip
    names = {
        "transformer.wte.": "token_embedding.",
        "transformer.ln_f.": "norm.",
        "transformer.h.": "blocks.",
        "ln_1.": "norm1.",
        "ln_2.": "norm2.",
        "attn.c_attn.": "attention.qkv.",
        "attn.c_proj.": "attention.proj.",
        "mlp.c_fc.": "mlp.up.",
        "mlp.c_proj.": "mlp.down.",
        "lm_head.": "head.",
    }
    state = {}
    for key, value in theirs.state_dict().items():
        matrix = any(name in key for name in ("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        for their_name, our_name in names.items():
            key = key.replace(their_name, our_name)
        state[key] = value.t() if matrix else value
    state["position_embedding"] = state.pop("transformer.wpe.weight")[None]
    config = GPTConfig(num_layers=2, num_heads=2, width=16, block_size=32)
    ours = build_transformer(config, vocabulary_size=VOCABULARY, grid=GRID, prefix_length=1).eval()
    ours.load_state_dict(state)
    tokens = torch.randint(VOCABULARY, (2, 13))
    start = ours.token_embedding(tokens[:, :1])
    prefix = Prefix(start, torch.ones(2, 1, dtype=torch.bool))
    with torch.no_grad():
        torch.testing.assert_close(
            ours(tokens[:, 1:], prefix), theirs(tokens[:, :-1]).logits, atol=1e-5, rtol=0
        )


def test_llama_parts_equal_transformers() -> None:
    block = Block(LlamaConfig(num_layers=1, num_heads=2, width=16, mlp_width=24))
    their_config = TheirLlamaConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, rms_norm_eps=1e-6
    )
    mlp, norm = LlamaMLP(their_config), LlamaRMSNorm(16, eps=1e-6)
    gate_up = block.mlp.get_parameter("gate_up.weight")
    mlp.gate_proj.weight.data, mlp.up_proj.weight.data = (part.data for part in gate_up.chunk(2))
    mlp.down_proj.weight.data = block.mlp.get_parameter("down.weight").data
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(block.mlp(block.norm2(x)), mlp(norm(x)))


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_bfloat16_training_computes_the_same_gradients(kind: str) -> None:
    model, codes = small_transformer(kind), torch.randint(VOCABULARY, (4, 12))
    gradients = []
    for bf16 in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(codes, random_prefix(4))
        next_code_loss(logits, codes).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    model.zero_grad()
    assert float(functional.cosine_similarity(*gradients, dim=0)) > 0.98


def test_attention_by_its_matrix_equals_the_fused_one() -> None:
    query, key, value = torch.randn(3, 2, 4, 9, 8)
    fused = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(_causal_with_matrix(query, key, value, 0.0), fused)
