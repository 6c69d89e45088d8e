"""Shards from elsewhere, fetched before they are read."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from taming.data.shards.index import ShardFacts
from taming.data.shards.store import RemoteStore
from taming.errors import DataError


class FetchAhead:
    """A thread in each process that fetches the rest of a block of shards, and the next block.

    `blocks` gives the block in which an epoch (seed, epoch) takes each of `shards`. Several processes may
    want the same: each shard comes once. What goes wrong is left to the reading of the shard, which tells it.
    """

    def __init__(
        self, store: RemoteStore, shards: Sequence[ShardFacts], blocks: Callable[[int, int], np.ndarray]
    ) -> None:
        self._store, self._shards, self._blocks = store, shards, blocks
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._epoch, self._block, self._block_of = (0, -1), -1, np.zeros(0, dtype=np.int64)
        self._lock = threading.Lock()
        self._wanted: deque[ShardFacts] = deque()
        self._thread: threading.Thread | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("_store", "_shards", "_blocks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def reading(self, number: int, seed: int, epoch: int) -> None:
        """Shard `number` is about to be read."""
        if self._process != os.getpid():  # threads do not follow into a process that is forked
            self._begin()
        if self._epoch != (seed, epoch):
            self._epoch, self._block, self._block_of = (seed, epoch), -1, self._blocks(seed, epoch)
        block = int(self._block_of[number])
        if block != self._block:
            self._block = block
            self._want([shard for n, shard in enumerate(self._shards) if self._block_of[n] == block])

    def _want(self, block: list[ShardFacts]) -> None:
        # Two blocks at once, or else fetching the next would push out what is being read.
        store = self._store
        if len(block) < len(self._shards) and store.holds(self._shards, 2 * store.shuffle_shards):
            following, block_of = self._block + 1, self._block_of
            if following > block_of.max():
                seed, epoch = self._epoch
                following, block_of = 0, self._blocks(seed, epoch + 1)
            block += [shard for n, shard in enumerate(self._shards) if block_of[n] == following]
        with self._lock:
            self._wanted = deque(block)
            if self._thread is None:
                self._thread = threading.Thread(target=self._fetch, name="fetches-ahead", daemon=True)
                self._thread.start()

    def _fetch(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._thread = None
                    return
                shard = self._wanted.popleft()
            try:
                self._store.path(shard)
            except DataError:
                with self._lock:
                    self._wanted.clear()
