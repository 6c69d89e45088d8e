"""The nearest-code quantizer: its search, its loss, and how it keeps codes in use."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from benchmarks.peak_memory import peak_bytes
from stage1_vq.quantizers import NearestConfig, NearestQuantizer, search
from stage1_vq.quantizers.health import kmeans
from stage1_vq.quantizers.search import nearest_codes


@pytest.mark.parametrize(("latents", "codes", "tile"), [(7, 5, 3), (64, 33, 16), (10, 40, 64), (1, 2, 1)])
def test_search_agrees_with_a_loop(latents: int, codes: int, tile: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search, "LATENTS_PER_TILE", tile)
    monkeypatch.setattr(search, "CODES_PER_TILE", tile + 1)
    monkeypatch.setattr(search, "BLOCK", 4)
    generator = torch.Generator().manual_seed(latents)
    z, book = torch.randn(latents, 4, generator=generator), torch.randn(codes, 4, generator=generator)
    expected = []
    for latent in z.double():
        distances = [float((latent - code).square().sum()) for code in book.double()]
        expected.append(min(range(codes), key=distances.__getitem__))
    assert nearest_codes(z, book).tolist() == expected


def test_search_takes_the_lower_index_on_a_tie(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search, "CODES_PER_TILE", 2)
    book = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 2.0], [1.0, 0.0]])
    assert nearest_codes(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), book).tolist() == [0, 1]


def test_search_holds_a_tile_of_the_scores_at_most(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search, "LATENTS_PER_TILE", 64)
    monkeypatch.setattr(search, "CODES_PER_TILE", 256)
    z, book = torch.randn(512, 4), torch.randn(8192, 4)
    most = peak_bytes(lambda: nearest_codes(z, book))
    assert most < 4 * (2 * 64 * 256 + 4 * 8192)  # a tile twice, and a few numbers a code; all are 4 * 2^22


def test_beta_weighs_the_term_that_it_is_on():
    z = torch.randn(2, 3, 4, 4)
    terms = {}
    for where in ("commitment", "codebook"):
        quantizer = NearestQuantizer(NearestConfig(codebook_size=8, code_dim=3, beta=0.25, beta_on=where))
        torch.nn.init.normal_(quantizer.embedding.weight, generator=torch.Generator().manual_seed(0))
        latents = z.clone().requires_grad_()
        quantizer(latents).loss.backward()
        terms[where] = (latents.grad, quantizer.embedding.weight.grad)
    assert_close(terms["commitment"][0] * 4, terms["codebook"][0])
    assert_close(terms["commitment"][1], terms["codebook"][1] * 4)


def test_gradient_goes_straight_through():
    quantizer = NearestQuantizer(NearestConfig(codebook_size=8, code_dim=3))
    z, wanted = torch.randn(1, 3, 2, 2, requires_grad=True), torch.randn(1, 3, 2, 2)
    (quantizer(z).quantized * wanted).sum().backward()
    assert_close(z.grad, wanted)


def test_initial_codes_are_uniform_within_one_nth():
    weight = NearestQuantizer(NearestConfig(codebook_size=50, code_dim=64)).embedding.weight.detach()
    assert weight.abs().max() <= 1 / 50
    assert weight.std() == pytest.approx(2 / 50 / 12**0.5, rel=0.05)


def test_kmeans_finds_separate_clusters():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    latents = centres.repeat(50, 1) + 0.1 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    found = kmeans(latents, 4)
    # Lloyd's method may leave two starts in one cluster; every centre found lies in a cluster or between two.
    error = torch.cdist(latents, found).min(1).values.mean()
    assert error < torch.cdist(latents, latents[:4]).min(1).values.mean()
    assert torch.equal(kmeans(latents, 4), found)


def test_kmeans_init_waits_for_enough_latents_then_uses_all_codes():
    quantizer = NearestQuantizer(NearestConfig(codebook_size=32, code_dim=4, kmeans_init=True)).train()
    generator = torch.Generator().manual_seed(0)
    start = quantizer.embedding.weight.detach().clone()
    quantizer(torch.randn(1, 4, 4, 8, generator=generator))
    quantizer.after_step()
    assert not quantizer.initialised
    assert torch.equal(quantizer.embedding.weight, start)
    z = torch.randn(1, 4, 8, 16, generator=generator)
    quantizer(z)
    quantizer.after_step()
    assert quantizer.initialised
    assert len(quantizer(z).indices.unique()) > 24


def test_dead_codes_become_recent_latents():
    config = NearestConfig(codebook_size=16, code_dim=4, revive_after=3)
    quantizer = NearestQuantizer(config).train()
    z = 5 + torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    used_at_first = len(quantizer(z).indices.unique())
    assert used_at_first < 4  # all codes lie at zero, far from the latents
    quantizer.after_step()
    for _ in range(3):
        quantizer(z)
        quantizer.after_step()
    assert len(quantizer(z).indices.unique()) > 8


def test_codes_in_use_stay_as_they_are():
    quantizer = NearestQuantizer(NearestConfig(codebook_size=2, code_dim=1, revive_after=1)).train()
    before = quantizer.embedding.weight.detach().clone()
    quantizer(torch.tensor([[[[-1.0, 1.0]]]]))
    quantizer.after_step()
    assert torch.equal(quantizer.embedding.weight, before)
