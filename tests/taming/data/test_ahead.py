from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import count, islice

import pytest

from taming.data.ahead import ITEMS, Ahead
from taming.errors import DataError


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "reads-ahead"]


def test_items_come_in_order_and_only_a_few_are_made_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in count():
            made.append(number)
            yield number

    ahead = Ahead(items())
    assert list(islice(ahead, 5)) == [0, 1, 2, 3, 4]
    time.sleep(0.1)
    assert len(made) <= 5 + ITEMS + 1
    assert next(ahead) == 5
    assert list(Ahead(iter(range(7)))) == list(range(7))
    assert list(Ahead(iter(()))) == []


def test_an_error_is_raised_when_its_turn_comes() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise DataError("picture 2 is gone")

    ahead = Ahead(items())
    assert next(ahead) == 1
    with pytest.raises(DataError, match="picture 2 is gone"):
        next(ahead)
    assert list(ahead) == []


def test_the_thread_ends_with_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taming.data.ahead._CHECK_SECONDS", 0.01)
    before = set(readers())
    ahead, closed = Ahead(count()), Ahead(count())
    assert (next(ahead), next(closed)) == (0, 0)
    ours = set(readers()) - before
    assert len(ours) == 2
    closed.close()
    assert sum(thread.is_alive() for thread in ours) == 1  # it was waited for
    del ahead
    for thread in ours:
        thread.join(2)
        assert not thread.is_alive()
    assert list(closed) == []
