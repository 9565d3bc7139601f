"""A work queue of keys: each key waits at most once, and never runs twice at a time."""

import asyncio
from collections.abc import Hashable
from typing import Generic, TypeVar

from gpustack.lib.backoff import delay_s

K = TypeVar("K", bound=Hashable)

RETRY_FIRST_S, RETRY_LIMIT_S = 0.5, 300.0


class WorkQueue(Generic[K]):
    """Deduplicating queue for level-triggered reconcilers.

    `add` while a key is being worked on marks it, and `done` puts it back: a change that lands
    during a run is never lost and never run at the same time.
    """

    def __init__(self) -> None:
        self._ready: asyncio.Queue[K] = asyncio.Queue()
        self._waiting: set[K] = set()
        self._active: set[K] = set()
        self._failures: dict[K, int] = {}
        self._timers: dict[K, asyncio.TimerHandle] = {}

    def add(self, key: K) -> None:
        if key in self._waiting:
            return
        self._waiting.add(key)
        if key not in self._active:
            self._ready.put_nowait(key)

    async def get(self) -> K:
        key = await self._ready.get()
        self._waiting.discard(key)
        if (timer := self._timers.pop(key, None)) is not None:
            timer.cancel()  # this look says when the next one is due
        self._active.add(key)
        return key

    def done(self, key: K) -> None:
        self._active.discard(key)
        if key in self._waiting:
            self._ready.put_nowait(key)

    def add_later(self, key: K, delay: float) -> None:
        """Add after a while. A key has one such appointment at most: the last one made."""
        if (timer := self._timers.get(key)) is not None:
            timer.cancel()
        self._timers[key] = asyncio.get_running_loop().call_later(delay, self.add, key)

    def retry(self, key: K) -> None:
        """Add again after a wait that doubles with each failure in a row."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        self.add_later(key, delay_s(failures, first_s=RETRY_FIRST_S, limit_s=RETRY_LIMIT_S))

    def forget(self, key: K) -> None:
        self._failures.pop(key, None)
