"""Wait for a state, never for a time."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def eventually(check: Callable[[], Awaitable[T]], what: str, *, within_s: float = 10) -> T:
    """The first true answer of `check`; fails, naming `what`, when there is none in time."""
    deadline = time.monotonic() + within_s
    while True:
        if found := await check():
            return found
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        await asyncio.sleep(0.01)


def soon(check: Callable[[], T], what: str, *, within_s: float = 10) -> T:
    """`eventually` for tests without an event loop."""
    deadline = time.monotonic() + within_s
    while True:
        if found := check():
            return found
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        time.sleep(0.01)


async def settled() -> None:
    """Return once the loop has handled what has come in, such as the ends of connections.

    A connection that ends during its handshake is known to nobody who could wait for it.
    """
    for _ in range(20):
        await asyncio.sleep(0)
