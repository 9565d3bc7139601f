"""Tasks that are told to end, whatever happens at that moment."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from gpustack.errors import DatabaseAway
from gpustack.lib.tasks import cancellable, forever, in_own_task


async def ended(task: asyncio.Task[None]) -> None:
    """Tell `task` to end once it waits; it must end as one that was told to."""
    for _ in range(3):
        await asyncio.sleep(0)
    task.cancel()
    async with asyncio.timeout(5):
        with pytest.raises(asyncio.CancelledError):
            await task


async def interrupted() -> None:
    """A driver that makes an error of its own of being interrupted."""
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        raise DatabaseAway from None


async def failing_at_that_moment() -> None:
    """A group one of whose tasks fails when it is told to end."""
    async with asyncio.TaskGroup() as group:
        group.create_task(interrupted())
        await asyncio.Event().wait()


async def test_what_a_driver_makes_of_a_cancellation_is_still_the_end() -> None:
    async def persistent() -> None:
        while True:
            with suppress(DatabaseAway), cancellable():
                await interrupted()

    await ended(asyncio.ensure_future(persistent()))


async def test_a_group_that_fails_at_that_moment_ends_with_who_started_it() -> None:
    async def persistent() -> None:
        while True:
            with suppress(ExceptionGroup):
                await in_own_task(failing_at_that_moment())

    await ended(asyncio.ensure_future(persistent()))


@pytest.mark.parametrize("work", [interrupted, failing_at_that_moment])
async def test_what_goes_on_for_ever_ends_whatever_its_step_makes_of_that(
    work: Callable[[], Awaitable[None]],
) -> None:
    await ended(asyncio.ensure_future(forever("work", work, every_s=60)))


async def test_a_failure_of_a_group_is_no_cancellation() -> None:
    async def fail() -> None:
        raise DatabaseAway

    async def group() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail())

    with suppress(ExceptionGroup):
        await group()
    with pytest.raises(ExceptionGroup):
        await in_own_task(group())
    with pytest.raises(DatabaseAway), cancellable():
        await fail()
