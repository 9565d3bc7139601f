"""Questions that may hang: each is asked in a thread of its own, and never twice at a time."""

import asyncio
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Asking(Generic[T]):
    """One question, asked again and again of who may hang.

    Its thread never keeps this process from exiting: threads of asyncio's own executor are joined
    at exit, and a hung driver would hang the exit.

    Args:
        question: blocks; raises what it likes.
    """

    def __init__(self, name: str, question: Callable[[], T]) -> None:
        self._name = name
        self._question = question
        self._answer: asyncio.Future[T | Exception] | None = None
        self._began = 0.0

    async def ask(self, *, wait_s: float) -> T | Exception | None:
        """The answer, or what it failed with; None: it has not come within `wait_s` seconds.

        The next call waits for that same answer.
        """
        loop = asyncio.get_running_loop()
        if self._answer is None:
            self._answer = loop.create_future()
            self._began = loop.time()
            threading.Thread(
                target=_answer, args=(self._question, loop, self._answer), name=self._name,
                daemon=True,
            ).start()  # fmt: skip
        await asyncio.wait({self._answer}, timeout=wait_s)
        if not self._answer.done():
            return None
        answer, self._answer = self._answer.result(), None
        return answer

    @property
    def waiting_s(self) -> float:
        """Seconds since the question was asked that has no answer yet; 0: there is none."""
        if self._answer is None:
            return 0.0
        return asyncio.get_running_loop().time() - self._began


def _answer(
    question: Callable[[], T],
    loop: asyncio.AbstractEventLoop,
    answer: asyncio.Future[T | Exception],
) -> None:
    said: T | Exception
    try:
        said = question()
    except Exception as error:  # noqa: BLE001  carried to who asks
        said = error
    try:
        loop.call_soon_threadsafe(answer.set_result, said)
    except RuntimeError:
        return  # the loop is closed: nobody waits
