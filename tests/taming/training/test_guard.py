"""What the guard takes for a collapse, and what not."""

from __future__ import annotations

import random

import pytest

from taming.training.guard import CollapseGuard, GuardConfig
from taming.training.plateau import Plateau, PlateauConfig

WINDOW = 10


class Run:
    """A guard that is fed one error a step."""

    def __init__(self, counts_from: int = 0, **config: object) -> None:
        self.guard = CollapseGuard(
            GuardConfig(**({"window": WINDOW} | config)),
            lambda step: step >= max(counts_from, self.guard.resumed_step) and self.guard.scale > 0,
        )
        self.step = 0

    def feed(self, *errors: float, blind: float = 1.0, times: int = WINDOW) -> str | None:
        for error in errors:
            for _ in range(times):
                self.guard.observe(self.step, error, blind, last=False)
                self.step += 1
                if self.guard.collapse is not None:
                    return self.guard.collapse
        return None


def test_an_error_that_rises_above_the_best_window_is_a_collapse():
    run = Run(counts_from=30)
    assert run.feed(0.8, 0.5, 0.4, 0.45, 0.55) is None
    reason = run.feed(0.7)
    assert "0.7, 1.8 times the best window's 0.4" in reason
    assert run.guard.healthy_step == 30  # the window from 30 to 39 was good, that from 40 rose too far


def test_before_the_term_counts_nothing_is_its_fault():
    assert Run(counts_from=100).feed(0.5, 0.3, 2.0, 2.0) is None


@pytest.mark.parametrize(
    ("errors", "windows"),
    [
        ((1.7, 2.0), 2),
        ((1.2, 1.3, 1.25), 3),
        ((1.05, 1.04, 1.03, 1.04, 1.03), 5),
        ((1.9, 1.4, 1.9), 3),
        ((1.9, *[1.7] * 9), 10),  # it fell at first, and then no more
    ],
)
def test_a_run_that_was_ruined_before_it_was_good(errors: tuple[float, ...], windows: int):
    run = Run()
    assert "mean colour alone would give 1" in run.feed(*errors)
    assert run.step == windows * WINDOW


@pytest.mark.parametrize(
    "errors",
    [
        (1.7, 1.5, 1.3, 1.1, 0.9, 0.7),  # slow, but falling
        (9.0, 6.0, 4.0, 3.0, 2.0, 1.0),  # from far away
        tuple(1.8 * 0.985**window for window in range(40)),  # 1.5 % a window, for forty windows
        (1.3, 0.95, 0.95, 0.95, 0.95, 0.95),  # level, but better than nothing
        (1.36, 1.38, 1.1, 0.8, 0.6, 0.5),  # held back at first, as by a weight of 0.8 from step 0
    ],
)
def test_a_slow_start_is_no_collapse(errors: tuple[float, ...]):
    assert Run().feed(*errors) is None


def test_noise_of_small_batches_is_no_collapse():
    noise = random.Random(0)
    run = Run(counts_from=300, window=100)  # the default
    for step in range(5000):
        level = 0.2 + 0.8 * 0.995**step + (0.03 if step > 300 else 0)  # the term costs something
        assert run.feed(level * noise.lognormvariate(0, 0.3), times=1) is None


def test_what_remains_of_the_weight():
    run = Run(weight_factor=0.1, max_rollbacks=2)
    guard = run.guard
    assert guard.needs_checkpoint(0)
    guard.arm(0)
    assert not guard.needs_checkpoint(0)
    run.feed(2.0, 2.0)
    guard.rolled_back(0)
    assert (guard.scale, guard.resumed_step, guard.collapse) == (0.1, 2 * WINDOW, None)
    assert [guard.needs_checkpoint(step) for step in (0, 19, 20)] == [False, False, True]
    run.step = 0
    assert run.feed(0.9, 0.5) is None
    guard.arm(20)
    assert run.feed(0.9) is not None
    guard.rolled_back(20)
    assert guard.scale == 0
    assert run.feed(3.0, 3.0, 3.0) is None  # nothing is left to cut


def test_the_end_is_judged_if_there_is_enough_of_it():
    for steps, found in ((2, False), (3, True)):
        run = Run()
        run.feed(0.5)
        for index in range(steps):
            run.guard.observe(10 + index, 0.9, 1.0, last=index == steps - 1)
        assert (run.guard.collapse is not None) == found


def test_a_restored_guard_goes_on_as_if_nothing_had_happened():
    first, second = Run(counts_from=5), Run(counts_from=5)
    first.guard.arm(5)
    first.feed(0.8, 0.5)
    first.feed(0.6, times=4)
    second.guard.load_state_dict(first.guard.state_dict())
    second.step = first.step
    for run in (first, second):
        run.feed(0.4, times=6)
        run.feed(0.8)
    assert first.guard.collapse == second.guard.collapse is not None
    assert first.guard.get_extra_state().tolist() == second.guard.get_extra_state().tolist()
    assert isinstance(second.guard.armed, bool)
    assert isinstance(second.guard.rollbacks, int)


def test_a_plateau_is_where_two_windows_differ_little():
    plateau = Plateau(PlateauConfig(window=5, share=0.1))
    found = [plateau.observe(step, error) for step, error in enumerate([1.0] * 5 + [0.8] * 5 + [0.75] * 5)]
    assert found == [False] * 14 + [True]
    assert plateau.reached == 15
    assert not plateau.observe(15, 0.1)
    again = Plateau(PlateauConfig(window=5, share=0.1))
    again.load_state_dict(plateau.state_dict())
    assert again.reached == 15


def test_a_falling_error_is_no_plateau():
    plateau = Plateau(PlateauConfig(window=5, share=0.02))
    assert not any(plateau.observe(step, 0.98**step) for step in range(100))
