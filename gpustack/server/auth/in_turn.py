"""Slow work that strangers can ask for: one piece at a time, and not too many wait."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from gpustack.errors import TooMany

T = TypeVar("T")

QUEUE_LIMIT = 10


class InTurn:
    """A thread of its own for work of one kind."""

    def __init__(self, name: str) -> None:
        self._one = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._waiting: set[asyncio.Future[Any]] = set()

    async def __call__(self, work: Callable[[], T]) -> T:
        """What `work` answers, once those before it are done.

        Raises:
            TooMany: QUEUE_LIMIT others wait already.
        """
        if len(self._waiting) >= QUEUE_LIMIT:
            raise TooMany("too many logins at once: try again in a moment", retry_after_s=2)
        future = asyncio.get_running_loop().run_in_executor(self._one, work)
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        return await future
