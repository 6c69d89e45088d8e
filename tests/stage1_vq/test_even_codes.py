"""revive_below: codes that are chosen seldom move to where latents are many."""

from __future__ import annotations

import pytest
import torch

from stage1_vq.quantizers import EMAConfig, NearestConfig, build_quantizer
from taming.config import build_config
from taming.errors import ConfigError
from taming.metrics.codebook import count_codes, perplexity

TOTAL = 400


def uneven_latents(seed: int) -> torch.Tensor:
    """(1, 2, 16, 16): most latents lie close together, some far away."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 2, 16, 16, generator=generator)
    far = torch.rand(1, 1, 16, 16, generator=generator) < 0.04
    return torch.where(far, 8 * latents, 0.3 * latents)


def evenness(kind: str, revive_below: float | None, *, first: int = 0) -> float:
    """Perplexity of fresh latents after 200 steps from step `first` of 400."""
    torch.manual_seed(0)
    config = {"nearest": NearestConfig, "ema": EMAConfig}[kind]
    quantizer = build_quantizer(
        config(codebook_size=32, code_dim=2, kmeans_init=True, revive_after=20, revive_below=revive_below)
    ).train()
    for step in range(first, first + 200):
        quantizer.before_step(step, TOTAL)
        quantizer(uneven_latents(step))
        quantizer.after_step()
    codes = torch.cat([quantizer.encode(uneven_latents(1000 + n)) for n in range(8)])
    return float(perplexity(count_codes(codes, 32)))


@pytest.mark.parametrize("kind", ["nearest", "ema"])
def test_it_evens_the_codes_out(kind: str) -> None:
    assert evenness(kind, 0.5) > 1.1 * evenness(kind, None)


def test_it_rests_near_the_end_of_a_run() -> None:
    assert evenness("nearest", 0.5, first=TOTAL) == evenness("nearest", None, first=TOTAL)


def test_what_it_counts_is_saved() -> None:
    config = EMAConfig(codebook_size=8, code_dim=2, revive_after=5, revive_below=0.5)
    quantizer = build_quantizer(config).train()
    quantizer.before_step(0, TOTAL)
    quantizer(uneven_latents(0))
    quantizer.after_step()
    again = build_quantizer(config)
    again.load_state_dict(quantizer.state_dict())
    rates = again.state_dict()["choice_rate"]
    assert torch.equal(rates, quantizer.state_dict()["choice_rate"])
    assert not torch.equal(rates, torch.ones(8))


def test_it_needs_revival() -> None:
    with pytest.raises(ConfigError, match="revive_below does nothing without revive_after"):
        build_config(NearestConfig, {"revive_below": 0.5})
