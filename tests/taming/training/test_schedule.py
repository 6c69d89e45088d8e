"""The learning rate is a function of the step alone."""

import itertools

import pytest
import torch

from taming.training.config import OptimizerConfig
from taming.training.schedule import learning_rate, set_learning_rate


def config(**values: object) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"learning_rate": 1.0, **values})


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    rates = [learning_rate(config(warmup_steps=4), step, 10) for step in range(6)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_starts_at_the_peak_and_ends_at_the_final_ratio(schedule: str) -> None:
    rates = [
        learning_rate(config(schedule=schedule, final_ratio=0.1, warmup_steps=2), s, 12) for s in range(12)
    ]
    assert rates[2] == pytest.approx(1)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[2:]))


def test_cosine_is_half_way_in_the_middle() -> None:
    assert learning_rate(config(schedule="cosine"), 50, 101) == pytest.approx(0.5)


def test_every_group_gets_the_rate() -> None:
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 3.0}], lr=1.0)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
