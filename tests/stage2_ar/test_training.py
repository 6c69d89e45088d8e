"""What a training of stage two can be told: random orders, disturbed inputs, smoothing, Muon, recompute."""

from __future__ import annotations

import copy
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from stage1_vq import VQModel
from stage2_ar import ARPipeline
from stage2_ar.best_model import BestModel
from stage2_ar.config import AROptimizerConfig, ARTrainConfig, RandomOrderConfig
from stage2_ar.describe import describe
from stage2_ar.model import ARModel
from stage2_ar.optimizers import hidden_matrices, transformer_optimizers
from stage2_ar.random_order import random_share, sample_orders
from stage2_ar.task import ARTask, disturbed
from stage2_ar.train import train
from stage2_ar.transformer import next_code_loss
from taming.config import build_config
from taming.errors import ConfigError, UserError
from taming.training import compiler, loop
from taming.training.checkpoint import list_checkpoints
from tests.conftest import TINY_TRAINING, ar_config, ar_values, make_pipeline

NONE = {"kind": "none"}


def everything(tokenizer: Path, **changes: Any) -> ARTrainConfig:
    """A tiny run with all options that draw random numbers or hold state."""
    values = ar_values(
        tokenizer=str(tokenizer),
        random_order={"start": 0.25, "end": None, "final_share": 0.5},
        pkeep=0.7,
        label_smoothing=0.1,
        keep="best",
        recompute=True,
    )
    values["transformer"] |= {"target_positions": True, "residual_dropout": 0.2}
    values["optimizer"] |= {"method": "muon"}
    return ar_config(**values | changes)


def test_an_interrupted_run_goes_on_bit_for_bit(
    tmp_path: Path, tokenizer: VQModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = everything(tmp_path / "tokenizer")
    real, calls = loop._Sums.add, []

    def stop_in_step_three(self: loop._Sums, values: dict[str, Tensor]) -> None:
        real(self, values)
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop._Sums, "add", stop_in_step_three)
    with pytest.raises(loop.Interrupted):
        train(config, tmp_path / "parts")
    monkeypatch.undo()
    train(config, tmp_path / "parts")
    train(config, tmp_path / "whole")
    states = []
    for name in ("whole", "parts"):
        folder = list_checkpoints(tmp_path / name / "checkpoints")[-1]
        states.append(
            {**load_file(folder / "modules.safetensors"), **load_file(folder / "optimizers.safetensors")}
        )
    assert states[0].keys() == states[1].keys()
    assert any(key.startswith("best/model.transformer.") for key in states[0])
    assert any(key.startswith("model_hidden/") for key in states[0])
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    one, other = (
        ARPipeline.from_pretrained(tmp_path / name).model.state_dict() for name in ("whole", "parts")
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_random_orders_are_functions_of_seed_step_and_sample() -> None:
    own, keys = torch.arange(20), [f"picture {n}" for n in range(64)]
    orders = sample_orders(own, 0.5, 3, 7, keys)
    assert orders is not None
    assert torch.equal(orders.sort(dim=1).values, own.expand(64, -1))
    # Any part of the batch, in any order, has the same ones.
    part = sample_orders(own, 0.5, 3, 7, keys[40:30:-1])
    assert part is not None
    assert torch.equal(part, orders[range(40, 30, -1)])
    random = (orders != own).any(dim=1)
    assert 16 < int(random.sum()) < 48
    for seed, step in ((4, 7), (3, 8)):
        other = sample_orders(own, 0.5, seed, step, keys)
        assert other is not None
        assert not torch.equal(other, orders)
    # A smaller share takes some of them away and changes no other.
    fewer = sample_orders(own, 0.25, 3, 7, keys)
    assert fewer is not None
    kept = (fewer != own).any(dim=1)
    assert int(kept.sum()) < int(random.sum())
    assert torch.equal(fewer[kept], orders[kept])
    assert sample_orders(own, 0.0, 3, 7, keys) is None
    every = sample_orders(own, 1.0, 3, 7, keys)
    assert every is not None
    first_cells = np.bincount(every[:, 0].numpy(), minlength=20)
    assert first_cells.max() < 14, "all cells come first about as often"


def test_random_orders_do_not_depend_on_micro_batches(tokenizer: VQModel) -> None:
    shape = {"kind": "llama", "num_layers": 1, "num_heads": 2, "width": 16, "target_positions": True}
    order = {"start": 0.0, "end": None, "final_share": 0.5}
    codes, keys = torch.randint(16, (4, 8, 8)), list("abcd")
    halves = [{"codes": codes[:2], "key": keys[:2]}, {"codes": codes[2:], "key": keys[2:]}]
    found = []
    for batches, step, random_order in (
        ([{"codes": codes, "key": keys}], 20, order),
        (halves, 20, order),
        (halves, 21, order),
        (halves, 20, None),
    ):
        task = prepared(tokenizer, transformer=shape, condition=NONE, random_order=random_order)
        task.train_step(batches, step)
        found.append(gradients(task))
    whole, parts, other_step, raster = found
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)
    assert (whole - other_step).norm() > 0.01 * whole.norm()
    assert (whole - raster).norm() > 0.01 * whole.norm()


def gradients(task: ARTask) -> Tensor:
    return torch.cat([weight.grad.flatten() for weight in task.model.parameters() if weight.grad is not None])


def test_the_share_of_random_orders() -> None:
    rar = RandomOrderConfig(start=0.5, end=0.75)
    shares = [random_share(rar, step, 400) for step in (0, 199, 200, 250, 299, 300, 399)]
    assert shares == pytest.approx([1, 1, 1, 0.5, 0.01, 0, 0])
    kept = RandomOrderConfig(start=0.0, end=None, final_share=0.25)
    assert [random_share(kept, step, 4) for step in range(4)] == pytest.approx([1, 0.8125, 0.625, 0.4375])
    assert random_share(RandomOrderConfig(start=1.0, end=None, final_share=0.5), 3, 4) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"random_order": {}}, r"set transformer\.target_positions to true"),
        ({"random_order": {"start": 0.5, "end": 0.25}}, "end 0.25 comes before start 0.5"),
        ({"random_order": {"end": None}}, "set final_share above 0"),
        ({"pkeep": 0.0}, "pkeep"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"train_only": "condition"}, "say which with init_from"),
    ],
)
def test_options_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ar_config(tokenizer="t", **changes)


def test_a_model_of_random_orders_says_so(tokenizer: VQModel) -> None:
    config = everything(Path("t"))
    assert ARTask(config, tokenizer, (16, 16)).model.config.any_order
    annealed = config.model_copy(update={"random_order": RandomOrderConfig()})
    assert not ARTask(annealed, tokenizer, (16, 16)).model.config.any_order


def test_only_inputs_are_disturbed() -> None:
    torch.manual_seed(0)
    codes = torch.zeros(4, 40, 40, dtype=torch.int64)
    found = disturbed(codes, 0.8, 10, {})
    assert 0.15 < float((found != 0).float().mean()) < 0.21  # a tenth of the random ones are 0 again
    assert set(found.unique().tolist()) == set(range(10))
    assert torch.equal(codes, torch.zeros_like(codes))
    assert disturbed(codes, 1.0, 10, {}) is codes


def test_targets_stay_where_inputs_are_disturbed(tokenizer: VQModel) -> None:
    """With nearly all inputs random, what is learned of single cells is still the targets' frequencies."""
    task = prepared(tokenizer, pkeep=1e-6, condition=NONE)
    codes = torch.full((4, 8, 8), 3)
    for step in range(30):
        logs = task.train_step([{"codes": codes, "key": ["a"] * 4}], step)
    assert float(logs["bits_per_code"]) < 2.0  # of 4: codes are drawn from 16


def prepared(tokenizer: VQModel, **changes: Any) -> ARTask:
    torch.manual_seed(0)
    values = ar_values(tokenizer="t", optimizer={"learning_rate": 3e-2}, **changes)
    values["training"] = {**TINY_TRAINING, "steps": 40, "clip_norm": None, "ema_decay": None}
    task = ARTask(build_config(ARTrainConfig, values), tokenizer, (16, 16))
    task.prepare(Accelerator(cpu=True, mixed_precision="no"), 40)
    return task


def test_label_smoothing_is_the_mixture_of_two_cross_entropies(tokenizer: VQModel) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, codes = torch.randn(2, 5, 7, generator=generator), torch.randint(7, (2, 5), generator=generator)
    log_p = logits.log_softmax(-1)
    plain = -log_p.gather(-1, codes[..., None]).mean()
    wanted = 0.7 * plain - 0.3 * log_p.mean()
    torch.testing.assert_close(next_code_loss(logits, codes, smoothing=0.3), wanted)
    torch.testing.assert_close(next_code_loss(logits, codes), plain)
    # The log has both: the loss that is minimised, and the bits of the codes as they are.
    task = prepared(tokenizer, label_smoothing=0.5, condition=NONE)
    logs = task.train_step([{"codes": torch.full((4, 8, 8), 3), "key": ["a"] * 4}], 0)
    for step in range(1, 20):
        logs = task.train_step([{"codes": torch.full((4, 8, 8), 3), "key": ["a"] * 4}], step)
    assert float(logs["bits_per_code"]) * np.log(2) < float(logs["loss"])


@pytest.mark.parametrize("kind", ["gpt", "llama", "windowed"])
def test_recomputing_gives_the_same_gradients(tokenizer: VQModel, kind: str) -> None:
    window = {"attention_window": [1, 1]} if kind == "windowed" else {}
    shape = {"kind": "gpt" if kind == "gpt" else "llama", "residual_dropout": 0.3, "attention_dropout": 0.1}
    if window:
        shape |= window | {"attention_dropout": 0.0}
    model = make_pipeline(tokenizer, {"kind": "class", "num_classes": 3}, **shape).model.train()
    other = copy.deepcopy(model)
    other.transformer.recompute = True
    codes, batch = torch.randint(16, (2, 4, 4)), {"label": torch.tensor([0, 2])}
    losses = []
    for one in (model, other):
        torch.manual_seed(3)  # dropout draws the same when it is computed again
        losses.append(next_code_loss(one(codes, batch), codes.flatten(1)))
        losses[-1].backward()
    assert torch.equal(losses[0], losses[1])
    found = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert found[name].grad is None, name
        else:
            torch.testing.assert_close(found[name].grad, parameter.grad, rtol=0, atol=0, msg=name)


def test_muon_has_the_matrices_of_blocks_and_adam_the_rest(tokenizer: VQModel) -> None:
    model = make_pipeline(tokenizer, {"kind": "segmentation", "num_labels": 7, "hidden_width": 8}).model
    names = set(hidden_matrices(model))
    layers = ("attention.qkv", "attention.proj", "mlp.gate_up", "mlp.down")
    assert names == {f"{layer}.{part}.weight" for layer in (0, 1) for part in layers}
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizers = transformer_optimizers(model, AROptimizerConfig(learning_rate=1e-2, method="muon"))
    assert list(optimizers) == ["model", "model_hidden"]
    assert len(optimizers["model_hidden"].param_groups[0]["params"]) == 2 * (3 + 1 + 2 + 1)
    batch = {"segmentation": torch.randint(7, (2, 8, 8))}
    codes = torch.randint(16, (2, 4, 4))
    model.condition.dropout = 0.5
    next_code_loss(model.train()(codes, batch), codes.flatten(1)).backward()
    for optimizer in optimizers.values():
        optimizer.step()
    for name, weight in model.named_parameters():
        moved = (weight - before[name]).square().mean().sqrt()
        assert moved < 1.1e-2, name  # once, not by both
    for name in names:
        assert (model.transformer.blocks.get_parameter(name) != before[f"transformer.blocks.{name}"]).any()


def test_adam_alone_is_what_it_was(tokenizer: VQModel) -> None:
    model = make_pipeline(tokenizer, NONE).model
    optimizers = transformer_optimizers(model, AROptimizerConfig(learning_rate=1e-2, weight_decay=0.1))
    (optimizer,) = optimizers.values()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(weight.ndim == 2 for weight in optimizer.param_groups[0]["params"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_the_best_weights_are_kept(tokenizer: VQModel) -> None:
    model = make_pipeline(tokenizer, NONE).model
    best = BestModel(model)
    start = copy.deepcopy(model.state_dict())
    best.offer(model, 2.0, 10)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    best.offer(model, 2.5, 20)
    assert (best.step, best.loss) == (10, 2.0)
    assert all(torch.equal(value, start[name]) for name, value in best.model.state_dict().items())
    again = BestModel(model)
    again.load_state_dict(best.state_dict())
    assert (again.step, again.loss) == (10, 2.0)
    best.offer(model, 1.5, 30)
    assert best.step == 30
    assert all(
        torch.equal(value, model.state_dict()[name]) for name, value in best.model.state_dict().items()
    )
    assert not any(weight.requires_grad for weight in best.parameters())


def test_a_run_saves_its_best(tmp_path: Path, tokenizer: VQModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    states: list[dict[str, Tensor]] = []
    losses = iter((2.0, 2.0, 3.0, 3.0))  # held-out and training pictures, twice

    def measure(self: ARTask, model: ARModel, batches: object) -> tuple[float, float]:
        states.append(copy.deepcopy(model.state_dict()))
        return next(losses), 0.5

    monkeypatch.setattr(ARTask, "_measure", measure)
    result = train(ar_config(tokenizer=str(tmp_path / "tokenizer"), keep="best"), tmp_path / "run")
    assert result.figures["best_step"] == 2
    saved = ARPipeline.from_pretrained(result.model).model.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in states[0].items())
    assert not all(torch.equal(value, saved[name]) for name, value in states[-1].items())


def test_a_dry_run_tells_how_is_trained(tmp_path: Path, tokenizer: VQModel) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    ARPipeline(make_pipeline(tokenizer, NONE).model, tokenizer).save_pretrained(tmp_path / "start")
    shape = {"kind": "llama", "num_layers": 6, "num_heads": 2, "width": 16, "target_positions": True}
    facts = describe(everything(tmp_path / "tokenizer", transformer=shape))
    assert facts["optimiser"].startswith("Muon")
    assert facts["random orders"] == "of all samples up to 25% of the steps, then fewer, of 50% from 100% on"
    assert facts["input codes"] == "30% replaced by random ones"
    assert facts["saved model"] == "of the evaluation with the lowest held-out loss"
    units = {"KiB": 1.0, "MiB": 1024.0}
    numbers = re.findall(r"([\d.]+) (KiB|MiB)", facts["recompute"])
    kept, whole = (float(value) * units[unit] for value, unit in numbers)
    assert kept < 0.5 * whole
    plain = describe(ar_config(tokenizer=str(tmp_path / "tokenizer")))
    assert not {"random orders", "input codes", "recompute", "compile", "start"} & plain.keys()
    with pytest.raises(UserError, match="another transformer than this run"):
        describe(everything(tmp_path / "tokenizer", init_from=str(tmp_path / "start")))


def test_without_a_compiler_compile_is_refused(
    tmp_path: Path, tokenizer: VQModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    monkeypatch.setattr(compiler.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler .* or set compile=false"):
        train(ar_config(tokenizer=str(tmp_path / "tokenizer"), compile=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(tokenizer: VQModel) -> None:
    model = make_pipeline(tokenizer, NONE).model.train()
    other = copy.deepcopy(model)
    other.transformer.compile_blocks()
    codes = torch.randint(16, (2, 4, 4))
    for one in (model, other):
        next_code_loss(one(codes, {"key": ["a", "b"]}), codes.flatten(1)).backward()
    assert model.state_dict().keys() == other.state_dict().keys()
    found = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
