"""Signals while a run trains."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time

import pytest

from taming.training import signals
from taming.training.signals import Signals
from tests.ranks import run_ranks


@pytest.mark.parametrize("number", signals.STOPPING)
def test_the_first_is_noted_and_an_echo_is_not_a_second(number: int) -> None:
    before = [signal.getsignal(each) for each in signals.STOPPING]
    with Signals() as received:
        assert received.received == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher hands on what the terminal said already
        time.sleep(0.01)
        assert received.received == number
    assert [signal.getsignal(each) for each in signals.STOPPING] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_second_one_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "SAME_SECONDS", 0.05)

    def told_twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

    with pytest.raises(KeyboardInterrupt), Signals():
        told_twice()


def test_other_threads_take_no_signals() -> None:
    found: list[int] = []

    def run() -> None:
        with Signals() as received:
            found.append(received.received)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [0]


def hang(rank: int) -> None:
    """A process whose main thread is in a library that never looks at signals."""
    signals.SAME_SECONDS = signals.LEAVE_SECONDS = 0.1
    with Signals():
        for delay in (0.1, 0.4):
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGTERM)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000_000)


def test_a_second_one_leaves_even_where_the_main_thread_hangs() -> None:
    (outcome,) = run_ranks(hang, 1, timeout=20)
    assert outcome.exit_code == 128 + signal.SIGTERM
