"""What the quantizers are made of: gradients, entropies, the start and the revival of codes, schedules."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from stage1_vq.quantizers import (
    EMAConfig,
    EMAQuantizer,
    FSQConfig,
    FSQQuantizer,
    GumbelConfig,
    GumbelQuantizer,
    LFQConfig,
    NearestConfig,
    ResidualConfig,
    ResidualQuantizer,
    SimVQConfig,
    SimVQQuantizer,
    build_quantizer,
)
from stage1_vq.quantizers.entropy import bit_entropies, categorical_entropies
from stage1_vq.quantizers.gradient import attraction, pass_gradient, rotate
from stage1_vq.quantizers.search import largest_logit


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_attraction_is_two_squared_errors():
    z, q = noise(7, 3).requires_grad_(), noise(7, 3, seed=1).requires_grad_()
    loss, terms = attraction(z, q, 0.25, 1.5)
    found = torch.autograd.grad(3 * loss, (z, q))
    plain = 0.25 * F.mse_loss(z, q.detach()) + 1.5 * F.mse_loss(z.detach(), q)
    expected = torch.autograd.grad(3 * plain, (z, q))
    assert_close(loss, plain)
    assert_close(found, expected)
    assert_close(terms["commitment"], F.mse_loss(z, q).detach())


def test_rotation_carries_latents_onto_codes_and_keeps_angles():
    z, q = noise(50, 6).requires_grad_(), 3 * noise(50, 6, seed=1)
    assert_close(rotate(z, q), q, rtol=1e-4, atol=1e-5)
    gradient = noise(50, 6, seed=2)
    (found,) = torch.autograd.grad((pass_gradient(z, q, "rotation") * gradient).sum(), z)
    # A rotation and a scaling: the angle between gradient and code is that between new gradient and latent.
    assert_close(F.cosine_similarity(found, z.detach()), F.cosine_similarity(gradient, q), rtol=0, atol=1e-4)
    assert_close(found.norm(dim=1) / gradient.norm(dim=1), q.norm(dim=1) / z.detach().norm(dim=1))


def test_rotation_bears_a_latent_of_zero_and_one_opposite_its_code():
    z = torch.tensor([[0.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    out = pass_gradient(z, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), "rotation")
    out.sum().backward()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_bit_entropies_are_those_of_all_codes(bits: int):
    logits = noise(40, bits).requires_grad_()
    patterns = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * bits)
    chances = torch.stack(
        [(logits.sigmoid() * p + (1 - logits.sigmoid()) * (1 - p)).prod(1) for p in patterns]
    )
    mean = chances.mean(1)
    each = -(chances * chances.log()).sum(0).mean()
    batch = -(mean * mean.log()).sum()
    found = bit_entropies(logits, bits, training=True)
    assert_close(found, (each, batch), rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(each - batch, logits)
    assert_close(torch.autograd.grad(found[0] - found[1], logits), expected, rtol=1e-3, atol=1e-6)


def test_entropies_in_groups_bound_the_whole_from_above():
    sign = torch.tensor([[1.0], [-1.0]]).repeat(100, 6)  # all bits agree: two patterns, equally often
    for group_bits, copies in ((6, 1), (3, 2), (2, 3), (1, 6)):
        _, batch = bit_entropies(50 * sign, group_bits, training=False)
        assert_close(batch, torch.tensor(copies * math.log(2)), rtol=1e-4, atol=0)


def test_categorical_entropies_of_certain_and_uncertain_rows():
    each, batch = categorical_entropies(1000 * torch.eye(8), training=False)
    assert_close((each, batch), (torch.tensor(0.0), torch.tensor(math.log(8))), rtol=0, atol=1e-5)
    each, batch = categorical_entropies(torch.zeros(5, 8), training=False)
    assert_close((each, batch), (torch.tensor(math.log(8)),) * 2, rtol=0, atol=1e-5)


def test_largest_logit_agrees_with_argmax():
    z, weight, bias = noise(100, 5), noise(70, 5, seed=1), noise(70, seed=2)
    assert torch.equal(largest_logit(z, weight, bias), F.linear(z, weight, bias).argmax(1))
    assert torch.equal(largest_logit(z, weight), F.linear(z, weight).argmax(1))


def test_ema_moves_chosen_codes_to_the_mean_of_their_latents_and_no_others():
    quantizer = EMAQuantizer(EMAConfig(codebook_size=3, code_dim=2, decay=0.5, epsilon=1e-9)).train()
    table = quantizer.embedding
    table.weight.copy_(torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]))
    table.embed_avg.copy_(table.weight)
    quantizer(torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]]]))  # both nearest to the first code,
    quantizer(torch.tensor([[[[9.0]], [[0.0]]]]))  # and of a second micro-batch one to the second
    assert table.weight[1, 0] == 10  # forward only looks
    quantizer.after_step()
    assert_close(table.cluster_size, torch.tensor([1.5, 1.0, 0.5]))
    assert_close(table.weight, torch.tensor([[2 / 1.5, 0.0], [9.5, 0.0], [0.0, 10.0]]))


@pytest.mark.parametrize("config", [EMAConfig, SimVQConfig, NearestConfig])
def test_placed_codes_have_their_whole_state(config: type):
    torch.manual_seed(0)
    quantizer = build_quantizer(config(codebook_size=8, code_dim=3))
    rows, codes, before = torch.arange(8) % 3 == 0, noise(8, 3), quantizer.codebook.detach().clone()
    quantizer.place(rows, codes)
    assert_close(quantizer.codebook.detach()[rows], codes[rows], rtol=1e-4, atol=1e-5)
    assert_close(quantizer.codebook.detach()[~rows], before[~rows])
    if isinstance(quantizer, EMAQuantizer):
        table = quantizer.embedding
        assert_close(table.embed_avg / table.cluster_size[:, None], table.weight)


def test_simvq_moves_all_codes_by_its_map_alone():
    quantizer = SimVQQuantizer(SimVQConfig(codebook_size=16, code_dim=3))
    assert [name for name, _ in quantizer.named_parameters()] == ["embedding_proj.weight"]
    assert quantizer.embedding.weight.std() == pytest.approx(3**-0.5, rel=0.4)


def test_gumbel_temperature_falls_along_a_cosine():
    config = GumbelConfig(temperature_start=0.8, temperature_end=0.2, temperature_hold_steps=10)
    falls = [config.temperature(step, 110) for step in range(120)]
    assert falls[:11] == [0.8] * 11
    assert falls[60] == pytest.approx(0.5)
    assert falls[110:] == [0.2] * 10
    assert all(later <= earlier for earlier, later in pairwise(falls))
    fixed = config.model_copy(update={"temperature_steps": 60})
    assert fixed.temperature(60, 10**6) == 0.2


def test_gumbel_training_draws_and_its_mixture_hardens():
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(GumbelConfig(codebook_size=8, code_dim=4, hard=False)).train()
    z = noise(2, 4, 6, 6)
    draws = [quantizer(z).indices for _ in range(2)]
    assert not torch.equal(*draws)
    gaps = []
    for step in (0, 99):
        quantizer.before_step(step, 100)
        output = quantizer(z)
        gaps.append((output.quantized - quantizer.lookup(output.indices)).abs().mean())
    assert gaps[1] < 0.1 * gaps[0]


def test_fsq_levels_are_even_and_zero_is_among_them():
    quantizer = FSQQuantizer(FSQConfig(levels=(4, 5)))
    assert quantizer.codebook[:, 0].unique().tolist() == [-1.0, -0.5, 0.0, 0.5]
    assert quantizer.codebook[:, 1].unique().tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert quantizer(torch.zeros(1, 2, 1, 1)).quantized.abs().max() == 0
    # Every code can be reached, also the outermost ones.
    z = torch.cartesian_prod(torch.linspace(-6, 6, 200), torch.linspace(-6, 6, 200))
    assert len(quantizer.choose(z).unique()) == 20


def test_lfq_reaches_the_largest_vocabulary_in_little_memory():
    quantizer = build_quantizer(LFQConfig(num_bits=18)).train()
    z = noise(2, 18, 8, 8).requires_grad_()
    output = quantizer(z)
    output.loss.backward()
    assert torch.isfinite(z.grad).all()
    assert output.terms["batch_entropy"] > output.terms["cell_entropy"]
    assert output.terms["batch_entropy"] <= 18 * math.log(2)


def test_residual_stages_refine():
    torch.manual_seed(0)
    config = ResidualConfig(num_stages=3, codes_per_stage=8, code_dim=2, kmeans_init=True)
    quantizer = ResidualQuantizer(config).train()
    z = noise(1, 2, 16, 16)
    for _ in range(3):  # a stage a step
        quantizer(z)
        quantizer.after_step()
    terms = quantizer(z).terms
    assert terms["residual_1"] > 2 * terms["residual_2"] > 4 * terms["residual_3"]
    index = quantizer.encode(z)[0, 3, 4]
    coarse = quantizer.stages[0].encode(z)[0, 3, 4]
    assert index // 64 == coarse
