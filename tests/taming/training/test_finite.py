"""What is told of a step that is not finite, and when too many were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from taming.errors import UserError
from taming.training.checkpoint import load_checkpoint, save_checkpoint
from taming.training.finite import NonFiniteSteps, exchange
from taming.training.gradients import clip_gradients, gradient_norm


def test_values_are_told_once_and_terms_go_before_gradients() -> None:
    values = {"rec": torch.tensor(0.25), "nll": torch.tensor(2.0)}
    told = exchange(values, {"model": torch.tensor(3.0)}, counts=torch.tensor([2, 0, 5]))
    assert told.wrong is None
    assert told.read == {"rec": 0.25, "nll": 2.0}
    assert told.means["nll"].dtype == torch.float32
    assert told.norms["model"].shape == ()
    assert told.counts is not None
    assert told.counts.tolist() == [2, 0, 5]
    infinite = {"model": torch.tensor(float("inf"))}
    assert exchange(values, infinite).wrong == "the gradient of the model"
    assert exchange(values | {"nll": torch.tensor(float("nan"))}, infinite).wrong == "nll"


def test_one_length_serves_the_check_and_the_clipping() -> None:
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    norm = gradient_norm(weights)
    assert norm.item() == 5
    clip_gradients(weights, norm, None)
    assert weights[1].grad.item() == 4
    clip_gradients(weights, norm, 1.0)
    assert weights[1].grad.item() == pytest.approx(0.8)
    weights[0].grad[1] = float("nan")
    assert gradient_norm(weights).isnan()


def test_a_run_gives_up_where_too_much_is_left_out() -> None:
    told: list[str] = []

    def go(steps: NonFiniteSteps, bad: Callable[[int], bool]) -> None:
        for step in range(10_000):
            if not bad(step):
                steps.made()
            elif (note := steps.refuse(step, "rec")) is not None:
                told.append(note)

    in_a_row, often, seldom = (NonFiniteSteps("skip") for _ in range(3))
    with pytest.raises(UserError, match=r"step 9099: .* the last 100 steps were left out; lower optimizer"):
        go(in_a_row, lambda step: step >= 9000)
    with pytest.raises(
        UserError, match=r"step 18: rec is not finite, and 10 steps, more than 10%, were left"
    ):
        go(often, lambda step: step % 2 == 0)
    told.clear()
    go(seldom, lambda step: step % 20 == 0)
    assert len(told) == 10 + 5
    assert "the 2nd of the run" in told[1]
    again = NonFiniteSteps("skip")
    again.load_state_dict(often.state_dict())
    assert (seldom.skipped, again.skipped, again.in_a_row) == (500, 10, 1)


def test_checkpoints_from_before_there_was_a_count_go_on(tmp_path: Path) -> None:
    accelerator, layer = Accelerator(cpu=True), nn.Linear(2, 2)
    folder = save_checkpoint(accelerator, tmp_path, 1, {"model": layer}, {}, {})
    steps = NonFiniteSteps("skip")
    load_checkpoint(accelerator, folder, {"model": layer, "nonfinite": steps}, {})
    assert steps.skipped == 0
