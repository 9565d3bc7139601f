import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from gpustack.errors import Unavailable
from gpustack.lib.secrets import Secret
from gpustack.schemas.models import ModelSource, Source, VersionSpec
from gpustack.worker.model_files import ModelFiles
from gpustack.worker.reconcile import Failure, Trouble

REMOTE = VersionSpec(
    source=Source.HUGGING_FACE, huggingface_repo_id="org/m", huggingface_filename="m.gguf"
)


class Hub:
    """A source of files that delivers when the test says so."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.cancelled = 0
        self.deliver = asyncio.Event()
        self.error: Exception | None = None

    async def fetch(
        self,
        spec: ModelSource,
        cache_dir: Path,
        *,
        token: Secret | None,
        progress: Callable[[float], None],
    ) -> Path:
        self.asked.append(spec.location)
        progress(50.0)
        try:
            await self.deliver.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error:
            raise self.error
        return cache_dir / "m.gguf"


def files(group: asyncio.TaskGroup, hub: Hub) -> ModelFiles:
    return ModelFiles(
        group, cache_dir=Path("/cache"), token=None, worker_name="w", fetcher=hub.fetch
    )


async def turns() -> None:
    """Let every task that can go on do so."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_engines_that_wait_for_one_file_share_one_download() -> None:
    hub, seen = Hub(), list[tuple[str, float]]()
    async with asyncio.TaskGroup() as group:
        store = files(group, hub)
        first = group.create_task(store.path(REMOTE, lambda p: seen.append(("first", p))))
        second = group.create_task(store.path(REMOTE, lambda p: seen.append(("second", p))))
        await turns()
        hub.deliver.set()
    assert first.result() == second.result() == Path("/cache/m.gguf")
    assert hub.asked == ["org/m:m.gguf"]
    assert ("first", 50.0) in seen


async def test_a_download_ends_with_the_last_that_waits_for_it() -> None:
    hub = Hub()
    async with asyncio.TaskGroup() as group:
        store = files(group, hub)
        first = group.create_task(store.path(REMOTE, lambda _: None))
        second = group.create_task(store.path(REMOTE, lambda _: None))
        await turns()
        first.cancel()
        await turns()
        assert hub.cancelled == 0
        second.cancel()
        await turns()
        assert hub.cancelled == 1
        third = group.create_task(store.path(REMOTE, lambda _: None))
        hub.deliver.set()
    assert third.result() == Path("/cache/m.gguf")
    assert len(hub.asked) == 2


async def test_a_download_that_fails_is_a_sentence_and_is_tried_anew_next_time() -> None:
    hub = Hub()
    hub.deliver.set()
    hub.error = Unavailable("the hub is away")
    async with asyncio.TaskGroup() as group:
        store = files(group, hub)
        failure = await store.path(REMOTE, lambda _: None)
        assert failure == Failure(Trouble.FILES, "cannot fetch org/m:m.gguf: the hub is away")
        hub.error = OSError(28, "No space left on device")
        failure = await store.path(REMOTE, lambda _: None)
        assert isinstance(failure, Failure)
        assert "No space left" in failure.sentence
        hub.error = None
        assert await store.path(REMOTE, lambda _: None) == Path("/cache/m.gguf")


async def test_a_local_path_must_be_there(tmp_path: Path) -> None:
    there = VersionSpec(source=Source.LOCAL_PATH, local_path=str(tmp_path))
    missing = VersionSpec(source=Source.LOCAL_PATH, local_path=str(tmp_path / "no"))
    async with asyncio.TaskGroup() as group:
        store = files(group, Hub())
        assert await store.path(there, lambda _: None) == tmp_path
        assert await store.path(missing, lambda _: None) == Failure(
            Trouble.FILES, f"file not found: {tmp_path / 'no'} on worker w"
        )


async def test_a_path_that_cannot_be_looked_for_is_one_sentence(tmp_path: Path) -> None:
    long = VersionSpec(source=Source.LOCAL_PATH, local_path=f"{tmp_path}/{'x' * 300}.gguf")
    async with asyncio.TaskGroup() as group:
        failure = await files(group, Hub()).path(long, lambda _: None)
    assert isinstance(failure, Failure)
    assert failure.sentence == (
        f"cannot look for {long.local_path} on worker w: File name too long"
    )


@pytest.mark.parametrize("error", [KeyError("path"), UnicodeEncodeError("ascii", "ä", 0, 1, "x")])
async def test_a_download_that_fails_as_nobody_expected_fails_its_waiters_only(
    error: Exception,
) -> None:
    hub = Hub()
    async with asyncio.TaskGroup() as group:
        store = files(group, hub)
        both = [group.create_task(store.path(REMOTE, lambda _: None)) for _ in range(2)]
        await turns()
        hub.error = error
        hub.deliver.set()
    for waiter in both:
        failure = waiter.result()
        assert isinstance(failure, Failure)
        assert type(error).__name__ in failure.sentence
