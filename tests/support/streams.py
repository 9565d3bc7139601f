"""Chat streams that run beside a test, and load that must not notice what the test does."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from openai import AsyncOpenAI, OpenAIError

from tests.support.node import Node
from tests.support.wait import eventually


def client(node: Node, key: str, *, retries: int = 0) -> AsyncOpenAI:
    """The official client. By default it does not retry: every failure is seen."""
    return AsyncOpenAI(base_url=f"{node.url}/v1", api_key=key, max_retries=retries, timeout=60)


@dataclass
class Stream:
    """One chat completion as it arrives."""

    text: str = ""
    ids: set[str] = field(default_factory=set)
    finish_reason: str | None = None

    async def run(
        self, openai: AsyncOpenAI, model: str, prompt: str, *, max_tokens: int = 32
    ) -> "Stream":
        chunks = await openai.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
        )
        async for chunk in chunks:
            self.ids.add(chunk.id)
            for choice in chunk.choices:
                self.text += choice.delta.content or ""
                self.finish_reason = choice.finish_reason or self.finish_reason
        return self

    @property
    def whole(self) -> bool:
        return self.finish_reason in {"stop", "length"} and len(self.ids) == 1


@contextlib.asynccontextmanager
async def running_streams(
    node: Node, key: str, model: str, count: int = 1, *, max_tokens: int = 400
) -> AsyncIterator[Sequence[Stream]]:
    """Streams that have begun; on the way out each must still be going or whole, and end whole."""
    streams = [Stream() for _ in range(count)]
    async with client(node, key) as openai, asyncio.TaskGroup() as group:
        for number, stream in enumerate(streams):
            prompt = f"stream number {number}"
            group.create_task(stream.run(openai, model, prompt, max_tokens=max_tokens))

        async def begun() -> bool:
            return all(stream.ids for stream in streams)

        await eventually(begun, "every stream has begun")
        assert not any(stream.finish_reason for stream in streams), "too fast to test with"
        yield streams
    assert all(stream.whole for stream in streams), streams


@contextlib.asynccontextmanager
async def load(node: Node, key: str, model: str, workers: int = 4) -> AsyncIterator[list[str]]:
    """Short requests without a pause; answers the list of failures, which grows meanwhile."""
    failures: list[str] = []
    done = 0
    stop = asyncio.Event()

    async def worker(openai: AsyncOpenAI, number: int) -> None:
        nonlocal done
        while not stop.is_set():
            try:
                stream = await Stream().run(openai, model, f"load {number}", max_tokens=4)
                if not stream.whole:
                    failures.append(f"cut: {stream}")
            except OpenAIError as error:
                failures.append(repr(error))
            done += 1

    async with client(node, key) as openai, asyncio.TaskGroup() as group:
        for number in range(workers):
            group.create_task(worker(openai, number))

        async def warm() -> bool:
            return done > workers

        await eventually(warm, "the load runs")
        yield failures
        before = done

        async def goes_on() -> bool:
            return done > before + workers

        await eventually(goes_on, "the load still runs")
        stop.set()
