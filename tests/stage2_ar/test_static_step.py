"""The step with fixed shapes draws what the other one draws, and a captured graph does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stage2_ar.order import OrderConfig
from stage2_ar.sampling import static_step
from stage2_ar.sampling.sample import SamplingSettings, StepKind, picture_uniforms, sample_codes
from stage2_ar.sampling.static_step import StaticStep
from stage2_ar.transformer import Transformer, build_transformer
from stage2_ar.transformer_config import GPTConfig, LlamaConfig
from taming.types import Prefix
from tests.stage2_ar.small import CONFIGS, GRID, VOCABULARY, WIDTH, random_prefix, small_transformer

CELLS = GRID[0] * GRID[1]
SETTINGS = {
    "drawn": SamplingSettings(temperature=0.9, top_k=8, top_p=0.95),
    "greedy": SamplingSettings(greedy=True),
    "guided": SamplingSettings(guidance_scale=2.5),
    "scheduled": SamplingSettings(top_k=9, guidance_scale=3.0, guidance_schedule="cosine", guidance_power=2),
}


def _sample(
    model: Transformer, prefix: Prefix, settings: SamplingSettings, step: StepKind, *, seed: int = 0,
    known: tuple[Tensor, Tensor] | None = None, grid: tuple[int, int] = GRID,
) -> Tensor:  # fmt: skip
    rows = len(prefix.embeddings)
    null = random_prefix(rows, grid=grid, seed=1)
    null = replace(null, cells=None if prefix.cells is None else null.cells)
    uniforms = picture_uniforms(seed, 0, rows, grid[0] * grid[1])
    return sample_codes(model, prefix, null, grid, uniforms, settings, known=known, step=step)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_static_equals_eager(kind: str, settings: str) -> None:
    model, prefix = small_transformer(kind), random_prefix(3)
    eager = _sample(model, prefix, SETTINGS[settings], "eager")
    assert torch.equal(_sample(model, prefix, SETTINGS[settings], "static"), eager)
    assert len(eager.unique()) > (1 if settings == "greedy" else 3)


def test_without_cells_with_a_masked_prefix_and_on_a_smaller_grid() -> None:
    prefix = replace(random_prefix(3), cells=None)
    mask = prefix.mask.clone()
    mask[1, 0] = mask[2, 1] = False
    for kind in ("gpt", "llama"):
        for given in (prefix, replace(prefix, mask=mask)):
            eager = _sample(small_transformer(kind), given, SETTINGS["drawn"], "eager", grid=(2, 3))
            static = _sample(small_transformer(kind), given, SETTINGS["drawn"], "static", grid=(2, 3))
            assert torch.equal(static, eager)


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_another_order_and_target_positions(kind: str) -> None:
    config: GPTConfig | LlamaConfig = GPTConfig(num_layers=1, num_heads=2, width=WIDTH, target_positions=True)
    if kind == "llama":
        config = LlamaConfig(num_layers=1, num_heads=2, width=WIDTH, target_positions=True)
    model = build_transformer(
        config, vocabulary_size=VOCABULARY, grid=GRID, prefix_length=3, order=OrderConfig(kind="spiral_out")
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    prefix = random_prefix(2)
    eager = _sample(model, prefix, SETTINGS["guided"], "eager")
    assert torch.equal(_sample(model, prefix, SETTINGS["guided"], "static"), eager)


def test_known_cells() -> None:
    model, prefix = small_transformer("gpt"), random_prefix(2)
    mask = torch.zeros(2, *GRID, dtype=torch.bool)
    mask[:, 0], mask[0, 1, 2] = True, True
    wanted = torch.randint(VOCABULARY, (2, *GRID))
    eager = _sample(model, prefix, SETTINGS["drawn"], "eager", known=(wanted, mask))
    static = _sample(model, prefix, SETTINGS["drawn"], "static", known=(wanted, mask))
    assert torch.equal(static, eager)
    assert torch.equal(static[mask], wanted[mask])


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_loaded_again_it_draws_another_picture(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the call before may be left: a graph is kept and replayed."""
    model, made = small_transformer(kind), []

    class Kept(StaticStep):
        """One for all calls, as a graph is; it has drawn garbage before, as capturing does."""

        def __new__(cls, *args: object) -> Kept:
            if not made:
                made.append(super().__new__(cls))
            return made[0]

        def __init__(self, *args: object) -> None:
            if not hasattr(self, "codes"):
                super().__init__(*args)  # type: ignore[arg-type]
                self.step()

    monkeypatch.setattr(static_step, "StaticStep", Kept)
    for seed in range(3):
        prefix = random_prefix(2, seed=seed + 5)
        static = _sample(model, prefix, SETTINGS["drawn"], "static", seed=seed)
        assert torch.equal(static, _sample(model, prefix, SETTINGS["drawn"], "eager", seed=seed))
    assert len(made) == 1


def test_progress_counts_cells() -> None:
    seen: list[int] = []
    sample_codes(
        small_transformer("gpt"), random_prefix(1), None, GRID, picture_uniforms(0, 0, 1, CELLS),
        SamplingSettings(), step="static", progress=lambda done, total: seen.append(done),
    )  # fmt: skip
    assert seen == list(range(1, CELLS + 1))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_captured_graph_equals_eager(kind: str, settings: str) -> None:
    model = small_transformer.__wrapped__(kind).cuda()
    steps = []
    for seed in range(2):
        prefix = random_prefix(3, seed=seed)
        assert prefix.cells is not None
        prefix = Prefix(prefix.embeddings.cuda(), prefix.mask.cuda(), prefix.cells.cuda())
        null = random_prefix(3, seed=9)
        assert null.cells is not None
        null = Prefix(null.embeddings.cuda(), null.mask.cuda(), null.cells.cuda())
        uniforms = picture_uniforms(seed, 0, 3, CELLS)
        choice = SETTINGS[settings]
        graphed = sample_codes(model, prefix, null, GRID, uniforms, choice)
        assert torch.equal(graphed, sample_codes(model, prefix, null, GRID, uniforms, choice, step="eager"))
        steps.append(next(iter(static_step._kept[model].values())))
    assert steps[0] is steps[1]
    assert steps[0].graph is not None
