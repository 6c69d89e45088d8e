"""Every quantizer against vector-quantize-pytorch, the published modules' results, or a closed form.

Where definitions differ, on purpose, and what is compared instead:

- vector-quantize-pytorch's gradient-learned table has one squared error that moves both sides; ours has two,
  so that at beta 1 our loss is twice theirs and the gradients are equal.
- Its EMA divides every code by its smoothed count; ours leaves codes that were not chosen where they are.
  The chosen ones are compared.
- Its residual quantizer passes the picture's gradient to the latents once a stage, ours once.
- Its LFQ takes logarithms of probabilities cut at 1e-5 and holds all (N, K) of them; ours are exact. At few
  bits and a high temperature they agree.
- It has neither IBQ nor a Gumbel quantizer of this form: those are held against closed forms.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.testing import assert_close

from stage1_vq.config import VQModelConfig
from stage1_vq.model import VQModel
from stage1_vq.quantizers import (
    BSQConfig,
    BSQQuantizer,
    EMAConfig,
    EMAQuantizer,
    FSQConfig,
    FSQQuantizer,
    GumbelConfig,
    GumbelQuantizer,
    IBQConfig,
    IBQQuantizer,
    LFQConfig,
    LFQQuantizer,
    NearestConfig,
    NearestQuantizer,
    Quantizer,
    ResidualConfig,
    ResidualQuantizer,
    SimVQConfig,
    SimVQQuantizer,
)
from tests.reference_checkpoint import load_reference

CODES, DIM = 32, 6


@pytest.fixture
def theirs() -> Any:
    return pytest.importorskip("vector_quantize_pytorch")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(quantized: Tensor, loss: Tensor, z: Tensor, *others: nn.Parameter) -> tuple[Tensor, ...]:
    """Of a picture's pull on the quantised latents plus the loss."""
    pull = (quantized * noise(*quantized.shape, seed=7)).sum()
    return torch.autograd.grad(pull + loss, (z, *others))


def run(quantizer: Quantizer, z: Tensor, *others: nn.Parameter) -> tuple[Any, tuple[Tensor, ...]]:
    output = quantizer.train()(z)
    return output, gradients(output.quantized, output.loss, z, *others)


@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_ema(theirs: Any, l2: bool, gradient: str):
    other = theirs.VectorQuantize(
        dim=DIM,
        codebook_size=CODES,
        accept_image_fmap=True,
        decay=0.9,
        commitment_weight=0.25,
        use_cosine_sim=l2,
        rotation_trick=gradient == "rotation",
    ).train()
    ours = EMAQuantizer(
        EMAConfig(codebook_size=CODES, code_dim=DIM, decay=0.9, l2_normalised=l2, gradient=gradient)
    )
    start = other._codebook.embed[0]
    ours.embedding.weight.copy_(start)
    ours.embedding.embed_avg.copy_(start)
    used = torch.zeros(CODES, dtype=torch.bool)
    for step in range(3):
        z = noise(2, DIM, 8, 8, seed=step).requires_grad_()
        before = ours.codebook.clone()
        output, found = run(ours, z)
        quantized, indices, loss = other(z)
        assert torch.equal(output.indices, indices)
        assert_close(output.quantized, quantized, rtol=1e-4, atol=1e-5)
        assert_close(output.loss, loss, rtol=1e-4, atol=1e-6)
        assert_close(found, gradients(quantized, loss, z), rtol=1e-3, atol=1e-5)
        assert torch.equal(ours.codebook, before)
        ours.after_step()
        now = torch.bincount(indices.flatten(), minlength=CODES) > 0
        used |= now
        assert_close(ours.codebook[now], other._codebook.embed[0][now], rtol=1e-4, atol=1e-5)
        other._codebook.embed[0][~now] = ours.codebook[~now]
    assert used.float().mean() > 0.5


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_nearest(theirs: Any, gradient: str):
    other = theirs.VectorQuantize(
        dim=DIM,
        codebook_size=CODES,
        accept_image_fmap=True,
        learnable_codebook=True,
        ema_update=False,
        rotation_trick=gradient == "rotation",
    ).train()
    ours = NearestQuantizer(NearestConfig(codebook_size=CODES, code_dim=DIM, beta=1.0, gradient=gradient))
    ours.embedding.weight.data.copy_(other._codebook.embed[0])
    z = noise(2, DIM, 8, 8).requires_grad_()
    output, found = run(ours, z, ours.embedding.weight)
    quantized, indices, loss = other(z)
    assert torch.equal(output.indices, indices)
    assert_close(output.quantized, quantized, rtol=1e-4, atol=1e-5)
    assert_close(output.loss, 2 * loss.squeeze())
    # Their rotated gradient does not reach the table either: rotate_to detaches the code.
    expected = gradients(quantized, loss, z, other._codebook.embed)
    assert_close(found[0], expected[0], rtol=1e-3, atol=1e-5)
    (pulled,) = torch.autograd.grad(other(z)[2], other._codebook.embed)
    assert_close(found[1], pulled[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_simvq(theirs: Any, gradient: str):
    other = theirs.SimVQ(
        dim=DIM, codebook_size=CODES, channel_first=True, rotation_trick=gradient == "rotation"
    ).train()
    ours = SimVQQuantizer(SimVQConfig(codebook_size=CODES, code_dim=DIM, gradient=gradient))
    ours.embedding.weight.copy_(other.frozen_codebook)
    ours.embedding_proj.weight.data.copy_(other.code_transform.weight)
    z = noise(2, DIM, 8, 8).requires_grad_()
    output = ours.train()(z)
    quantized, indices, loss = other(z)
    assert torch.equal(output.indices, indices)
    assert_close(output.quantized, quantized, rtol=1e-4, atol=1e-5)
    assert_close(output.loss, loss)
    # The picture reaches the latents alone; the map learns from the loss.
    assert_close(
        gradients(output.quantized, output.loss, z), gradients(quantized, loss, z), rtol=1e-3, atol=1e-5
    )
    moved = torch.autograd.grad(ours(z).loss, ours.embedding_proj.weight)
    assert_close(moved, torch.autograd.grad(other(z)[2], other.code_transform.weight))


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (7, 5, 5), (4, 3, 6)])
def test_fsq(theirs: Any, levels: tuple[int, ...]):
    other, ours = theirs.FSQ(levels=list(levels)).train(), FSQQuantizer(FSQConfig(levels=levels))
    z = (2 * noise(2, len(levels), 16, 16)).requires_grad_()
    output, found = run(ours, z)
    quantized, indices = other(z)
    assert torch.equal(output.indices, indices.long())
    assert_close(output.quantized, quantized)
    assert_close(found, gradients(quantized, quantized.new_zeros(()), z), rtol=1e-4, atol=1e-6)
    every = torch.arange(ours.codebook_size)
    assert_close(ours.codebook, other.indices_to_codes(every[None])[0])


@pytest.mark.parametrize("kind", ["lfq", "bsq"])
def test_lfq_and_bsq(theirs: Any, kind: str):
    bits, temperature = 4, 2.0
    other = theirs.LFQ(
        codebook_size=2**bits,
        dim=bits,
        entropy_loss_weight=0.3,
        commitment_loss_weight=0.25,
        diversity_gamma=0.7,
        spherical=kind == "bsq",
    ).train()
    values = {
        "num_bits": bits,
        "entropy_weight": 0.3,
        "diversity": 0.7,
        "entropy_temperature": temperature,
        "entropy_group_bits": bits,
    }
    ours: Quantizer = (
        LFQQuantizer(LFQConfig(**values)) if kind == "lfq" else BSQQuantizer(BSQConfig(**values))
    )
    z = noise(2, bits, 8, 8).requires_grad_()
    output, found = run(ours, z)
    quantized, indices, loss = other(z, inv_temperature=1 / temperature)
    assert torch.equal(output.indices, indices)
    assert_close(output.quantized, quantized)
    assert_close(output.loss, loss, rtol=1e-3, atol=1e-4)
    assert_close(found, gradients(quantized, loss, z), rtol=1e-3, atol=1e-4)
    codes = ours.codebook if kind == "lfq" else ours.codebook * bits**0.5
    assert_close(codes, other.codebook)


def test_residual(theirs: Any):
    stages = 3
    other = theirs.ResidualVQ(
        dim=DIM,
        num_quantizers=stages,
        codebook_size=8,
        learnable_codebook=True,
        ema_update=False,
        rotation_trick=False,
    ).train()
    ours = ResidualQuantizer(ResidualConfig(num_stages=stages, codes_per_stage=8, code_dim=DIM, beta=1.0))
    for stage, layer in zip(ours.stages, other.layers, strict=True):
        stage.embedding.weight.data.copy_(layer._codebook.embed[0])
    z = noise(2, DIM, 8, 8).requires_grad_()
    output = ours.train()(z)

    def as_sequence(z: Tensor) -> Tensor:
        return rearrange(z, "b d h w -> b (h w) d")  # pictures fail in vector-quantize-pytorch 1.32

    quantized, indices, losses = other(as_sequence(z))
    quantized = rearrange(quantized, "b (h w) d -> b d h w", h=8)
    digits = torch.tensor([64, 8, 1])
    assert torch.equal(output.indices.flatten(1), (indices * digits).sum(-1))
    assert_close(output.quantized, quantized, rtol=1e-4, atol=1e-5)
    assert_close(output.loss, 2 * losses.mean())
    nothing = quantized.new_zeros(())
    (once,) = gradients(output.quantized, nothing, z)
    (thrice,) = gradients(quantized, nothing, z)
    assert_close(stages * once, thrice)
    found = torch.autograd.grad(ours(z).loss, [stage.embedding.weight for stage in ours.stages])
    expected = torch.autograd.grad(
        other(as_sequence(z))[2].mean(), [layer._codebook.embed for layer in other.layers]
    )
    for ours_, theirs_ in zip(found, expected, strict=True):
        assert_close(ours_, theirs_[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("l2", [False, True])
def test_ibq(l2: bool):
    """The paper's equations, with the one-hot of which its gradient is defined."""
    config = IBQConfig(codebook_size=CODES, code_dim=DIM, l2_normalised=l2, entropy_temperature=0.5)
    ours = IBQQuantizer(config)
    nn.init.normal_(ours.embedding.weight)
    z = noise(2, DIM, 4, 4).requires_grad_()
    output, found = run(ours, z, ours.embedding.weight)

    rows, table = rearrange(z, "b d h w -> (b h w) d"), ours.embedding.weight
    if l2:
        rows, table = F.normalize(rows, dim=1), F.normalize(table, dim=1)
    logits = rows @ table.T
    soft = logits.softmax(1)
    hard = F.one_hot(soft.argmax(1), CODES).float()
    quantized = (hard + soft - soft.detach()) @ table
    code = hard @ table
    p = (logits / 0.5).softmax(1)
    entropy = -(p * p.log()).sum(1).mean() + (p.mean(0) * p.mean(0).log()).sum()
    loss = (
        F.mse_loss(quantized, rows) + F.mse_loss(code.detach(), rows) + 0.25 * F.mse_loss(code, rows.detach())
    )
    loss = loss + 0.05 * entropy
    expected = rearrange(quantized, "(b h w) d -> b d h w", b=2, h=4)
    assert torch.equal(output.indices.flatten(), hard.argmax(1))
    assert_close(output.quantized, expected, rtol=1e-4, atol=1e-5)
    assert_close(output.loss, loss, rtol=1e-4, atol=1e-6)
    assert_close(found, gradients(expected, loss, z, ours.embedding.weight), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("hard", [True, False])
def test_gumbel(hard: bool):
    """Noise -log(-log u) on the logits, softmax at the temperature; divergence from uniform."""
    ours = GumbelQuantizer(GumbelConfig(codebook_size=CODES, code_dim=DIM, hard=hard, kl_weight=0.1)).train()
    ours.temperature = 0.7
    z = noise(2, DIM, 4, 4).requires_grad_()
    torch.manual_seed(3)
    output, found = run(ours, z, ours.proj.weight, ours.embed.weight)

    logits = rearrange(ours.proj(z), "b k h w -> (b h w) k")
    torch.manual_seed(3)
    drawn = -torch.empty_like(logits).exponential_().log()
    soft = ((logits + drawn) / 0.7).softmax(1)
    choice = F.one_hot(soft.argmax(1), CODES) + soft - soft.detach() if hard else soft
    quantized = rearrange(choice @ ours.embed.weight, "(b h w) d -> b d h w", b=2, h=4)
    p = logits.softmax(1)
    loss = 0.1 * F.kl_div(torch.full_like(p, 1 / CODES).log(), p, reduction="none").sum(1).mean()
    assert torch.equal(output.indices.flatten(), soft.argmax(1))
    assert_close(output.quantized, quantized, rtol=1e-4, atol=1e-5)
    assert_close(output.loss, loss, rtol=1e-4, atol=1e-7)
    expected = gradients(quantized, loss, z, ours.proj.weight, ours.embed.weight)
    assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_published_gumbel_model_gives_its_own_codes_and_pictures():
    published, state, io = load_reference("gumbel_vqgan")
    params = published["model"]["params"]
    net = params["ddconfig"]
    model = VQModel(
        VQModelConfig(
            resolution=net["resolution"],
            channels=net["ch"],
            channel_multipliers=net["ch_mult"],
            num_res_blocks=net["num_res_blocks"],
            attention_resolutions=net["attn_resolutions"],
            z_channels=net["z_channels"],
            quantizer={
                "kind": "gumbel",
                "codebook_size": params["n_embed"],
                "code_dim": params["embed_dim"],
                "kl_weight": params["kl_weight"],
            },
        )
    )
    model.load_state_dict(state)
    assert torch.equal(model.encode(io["image"]), io["codes"])  # in training mode as well
    model.eval()
    with torch.no_grad():
        assert_close(model.quantize.proj(model.latents(io["image"])), io["logits"], rtol=0, atol=1e-4)
        output = model(io["image"])
    assert torch.equal(output.quantizer.indices, io["codes"])
    assert_close(output.reconstruction, io["reconstruction"], rtol=0, atol=1e-4)
    assert_close(model.decode(io["codes"]), io["reconstruction"], rtol=0, atol=1e-4)
