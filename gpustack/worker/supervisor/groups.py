"""Process groups of engines: which are left, and their end."""

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from gpustack.lib import platform
from gpustack.worker.supervisor.records import (
    HOME_VARIABLE,
    TOOL_HOME_VARIABLE,
    UID_VARIABLE,
)


def groups_by_uid(home: Path) -> dict[str, set[int]]:
    """Engine uid -> process groups in which a live process carries it, for engines of `home`.

    Never our own group, whatever its environment says.
    """
    found: dict[str, set[int]] = {}
    for environment, group in _marked(HOME_VARIABLE, home):
        if uid := environment.get(UID_VARIABLE):
            found.setdefault(uid, set()).add(group)
    return found


def groups_of_tools(home: Path) -> set[int]:
    """Process groups of vendors' tools that agents of `home` have run."""
    return {group for _, group in _marked(TOOL_HOME_VARIABLE, home)}


def _marked(variable: str, home: Path) -> Iterator[tuple[dict[str, str], int]]:
    own = platform.process_group(os.getpid())
    for pid in platform.live_pids():
        environment = platform.process_environment(pid)
        if environment.get(variable) == os.fspath(home):
            group = platform.process_group(pid)
            if group is not None and group > 1 and group != own:
                yield environment, group


async def end_group(
    group: int, *, limit_s: float, reap: Callable[[], object] | None = None
) -> None:
    """Return when no process of `group` is alive: asked first, made to after `limit_s` seconds.

    Args:
        reap: collects the group's leader if it is a child of ours and has exited.
    """
    force = False
    while True:
        platform.kill_group(group, force=force)
        if await _gone(group, limit_s, reap):
            return
        # A process that survives SIGKILL hangs in the kernel. There is nothing else to do than
        # wait: its port and memory are in use until then.
        force = True


async def _gone(group: int, limit_s: float, reap: Callable[[], object] | None) -> bool:
    wait_s, loop = 0.005, asyncio.get_running_loop()
    deadline = loop.time() + limit_s
    while True:
        if reap:
            reap()
        if not platform.group_alive(group):
            if reap:
                reap()  # it may have become a zombie since
            return True
        if loop.time() >= deadline:
            return False
        await asyncio.sleep(wait_s)
        wait_s = min(wait_s * 1.5, 0.1)
