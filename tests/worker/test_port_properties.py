"""Whatever happens, no port is in two hands."""

import asyncio
import contextlib
import os
import random
import signal
import socket
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpustack.config.options import PortRange
from gpustack.errors import Unavailable
from gpustack.lib import platform
from gpustack.lib.role import Leave
from gpustack.worker.ports import PortLeases
from gpustack.worker.reconcile import Policy
from gpustack.worker.supervisor.records import HOME_VARIABLE, UID_VARIABLE, Records
from tests.support.control_plane import ControlPlane, assigned
from tests.support.ports import free_ports
from tests.support.worker_node import Node, eventually

SIZE = 4


class Leases(RuleBasedStateMachine):
    """Engines that start and end, engines that are found, and programs of others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = free_ports(SIZE)
        self.pool = PortLeases(PortRange(self.first, self.first + SIZE - 1))
        self.held: Counter[int] = Counter()
        self.foreign: dict[int, socket.socket] = {}

    @rule()
    def start(self) -> None:
        free = set(range(self.first, self.first + SIZE)) - set(self.held) - set(self.foreign)
        try:
            port = self.pool.lease()
        except Unavailable:
            assert not free
        else:
            assert port in free
            self.held[port] += 1

    @rule(offset=st.integers(-1, SIZE))
    def find(self, offset: int) -> None:
        self.pool.hold(self.first + offset)
        self.held[self.first + offset] += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        port = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.release(port)
        self.held -= Counter([port])

    @rule(offset=st.integers(0, SIZE - 1))
    def another_program(self, offset: int) -> None:
        port = self.first + offset
        if port in self.foreign:
            self.foreign.pop(port).close()
        else:
            self.foreign[port] = socket.create_server(("127.0.0.1", port))

    @invariant()
    def what_is_held_is_counted(self) -> None:
        assert all(count > 0 for count in self.held.values())

    def teardown(self) -> None:
        for listener in self.foreign.values():
            listener.close()


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


def ports_in_use(home: Path) -> dict[int, set[str]]:
    """Port -> the engines of this node, by uid, of which a process was started for it."""
    found: dict[int, set[str]] = {}
    for pid in platform.live_pids():
        marks = platform.process_environment(pid)
        if marks.get(HOME_VARIABLE) == os.fspath(home):
            with contextlib.suppress(OSError, ValueError):
                argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                port = int(argv[argv.index(b"--port") + 1])
                found.setdefault(port, set()).add(marks[UID_VARIABLE])
    return found


async def watch(home: Path) -> None:
    while True:
        shared = {port: uids for port, uids in ports_in_use(home).items() if len(uids) > 1}
        assert not shared, f"engines that share a port: {shared}"
        await asyncio.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [6, 30])
async def test_engines_that_start_and_end_and_are_adopted_at_random_share_no_port(
    node: Node, plane: ControlPlane, seed: int
) -> None:
    chance = random.Random(seed)
    first = int(node.flags["service_port_range"].partition("-")[0])
    node.flags["service_port_range"] = f"{first}-{first + SIZE - 1}"
    policy = Policy(first_s=0.05, limit_s=0.2, alike_limit=99)
    async with asyncio.TaskGroup() as group:
        watcher = group.create_task(watch(node.data_dir))
        for _ in range(6):
            async with node.agent(leave=Leave.ORPHANED, policy=policy):
                for _ in range(8):
                    await disturb(node, plane, chance)
            if chance.random() < 0.5 and (engines := node.engines()):  # while no agent runs
                os.kill(chance.choice(engines), signal.SIGKILL)
        async with node.agent(policy=policy):
            for id in list(plane.instances):
                await plane.change(id, deleting=True)
            await eventually(lambda: not plane.instances and not node.engines(), limit_s=30)
        watcher.cancel()
    assert list(Records(node.data_dir).all()) == []
    pool = PortLeases(PortRange(first, first + SIZE - 1))
    assert sorted(pool.lease() for _ in range(SIZE)) == list(range(first, first + SIZE))


async def disturb(node: Node, plane: ControlPlane, chance: random.Random) -> None:
    """One thing happens; then wait for news of it, which there may be none of."""
    so_far = len(plane.reports)
    what = chance.choice(["new", "new", "delete", "kill", "kill"])
    wanted = [id for id, one in plane.instances.items() if not one.deleting]
    if what == "new" and len(wanted) < SIZE + 2:
        words = chance.choice(["", "", "stubborn", "stubborn away", "delay=0.1", "exit=1"])
        id = max((id for id, _ in plane.reports), default=0) + len(plane.instances) + 1
        await plane.assign(assigned(id, node.spec(words)))
    elif what == "delete" and wanted:
        await plane.change(chance.choice(wanted), deleting=True)
    elif engines := node.engines():
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(engines), signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        await plane.until(lambda: len(plane.reports) > so_far, limit_s=0.3)
