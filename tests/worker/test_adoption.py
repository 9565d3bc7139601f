"""Agents die; their engines do not. Real agent processes, killed for real."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from gpustack.lib import platform
from gpustack.lib.role import Leave
from gpustack.lib.secrets import Secret
from gpustack.schemas.instances import InstanceState
from gpustack.worker.enrolment import load_membership
from gpustack.worker.supervisor import adoption
from gpustack.worker.supervisor.records import (
    HOME_VARIABLE,
    TOOL_HOME_VARIABLE,
    UID_VARIABLE,
    Record,
    Records,
)
from tests.support.control_plane import ControlPlane, assigned, listening
from tests.support.ports import free_ports
from tests.support.worker_node import QUICK_LIMITS, Node, eventually

#: Of this process namespace: the next process gets a number above it.
LAST_PID = Path("/proc/sys/kernel/ns_last_pid")

RUNNING, GONE = InstanceState.RUNNING, InstanceState.GONE


async def test_a_killed_agent_leaves_its_engine_and_the_next_one_adopts_it(
    node: Node, plane: ControlPlane
) -> None:
    agent = await node.spawn()
    await plane.assign(assigned(1, node.spec()))
    first = await plane.until_state(1, RUNNING, limit_s=20)
    await agent.kill()
    so_far = len(plane.reports)
    assert node.engines() == [first.pid]
    agent = await node.spawn()
    again = await plane.until_state(1, RUNNING, after=so_far, limit_s=20)
    assert (again.pid, again.port, again.restart_count) == (first.pid, first.port, 0)
    await plane.change(1, generation=2)
    await plane.until(lambda: plane.reports[-1][1].observed_generation == 2)
    assert {status.state for _, status in plane.reports[so_far:]} == {RUNNING}
    assert len(plane.registrations) == 1  # the second life announced itself with its credential
    assert plane.announcements[0].run_id != plane.registrations[0].run_id
    assert await agent.stop() == 0
    assert node.engines() == []


async def test_an_orphaned_agent_exits_at_once_and_leaves_its_engine(
    node: Node, plane: ControlPlane
) -> None:
    agent = await node.spawn()
    await plane.assign(assigned(1, node.spec()))
    status = await plane.until_state(1, RUNNING, limit_s=20)
    so_far, told_at = len(plane.reports), time.monotonic()
    assert await agent.orphan() == 0
    assert time.monotonic() - told_at < 1.0
    assert node.engines() == [status.pid]
    assert len(plane.reports) == so_far


async def test_an_agent_that_hangs_is_replaced_and_its_engine_adopted(
    node: Node, plane: ControlPlane
) -> None:
    hung = await node.spawn()
    await plane.assign(assigned(1, node.spec()))
    first = await plane.until_state(1, RUNNING, limit_s=20)
    os.kill(hung.pid, signal.SIGSTOP)
    so_far = len(plane.reports)
    agent = await node.spawn()
    again = await plane.until_state(1, RUNNING, after=so_far, limit_s=20)
    assert again.pid == first.pid
    assert await hung.wait() == -signal.SIGKILL
    await agent.stop()


async def test_the_end_of_an_adopted_engine_is_seen_and_it_is_started_again(
    node: Node, plane: ControlPlane
) -> None:
    async with node.agent(leave=Leave.ORPHANED):
        await plane.assign(assigned(1, node.spec()))
        first = await plane.until_state(1, RUNNING)
    so_far = len(plane.reports)
    async with node.agent():
        await plane.until_state(1, RUNNING, after=so_far)
        assert first.pid
        os.kill(first.pid, signal.SIGKILL)
        failed = await plane.until_state(1, InstanceState.ERROR, after=so_far)
        assert "unknown code" in failed.state_message
        again = await plane.until_state(1, RUNNING, after=len(plane.reports))
        assert (again.pid != first.pid, again.restart_count) == (True, 1)


async def test_the_port_of_an_adopted_engine_is_its_own_before_it_listens(
    node: Node, plane: ControlPlane
) -> None:
    async with node.agent(leave=Leave.ORPHANED):
        await plane.assign(assigned(1, node.spec("delay=1")))
        starting = await plane.until_state(1, InstanceState.STARTING)
    assert starting.port
    async with node.agent():
        await plane.assign(assigned(2, node.spec()))
        other = await plane.until_state(2, RUNNING)
        first = await plane.until_state(1, RUNNING)
        assert (first.port, first.pid) == (starting.port, starting.pid)
        assert other.port != starting.port
    assert plane.states(1)[:2] == ["starting", "running"]


async def test_an_adopted_engine_is_stopped_whole(node: Node, plane: ControlPlane) -> None:
    async with node.agent(leave=Leave.ORPHANED):
        await plane.assign(assigned(1, node.spec("stubborn")))
        await plane.until_state(1, RUNNING)
    assert len(node.engines()) == 2
    async with node.agent():
        await plane.change(1, deleting=True)
        await plane.until_state(1, GONE)
        assert node.engines() == []


async def test_an_engine_whose_record_has_no_pid_is_found_by_its_uid(
    node: Node, plane: ControlPlane
) -> None:
    async with node.agent(leave=Leave.ORPHANED):
        await plane.assign(assigned(1, node.spec()))
        first = await plane.until_state(1, RUNNING)
    (record,) = Records(node.data_dir).all()
    unfinished = {"pid": None, "start_ticks": None, "ready": False}
    Records(node.data_dir).put(record.model_copy(update=unfinished))
    so_far = len(plane.reports)
    async with node.agent():
        again = await plane.until_state(1, RUNNING, after=so_far)
        assert again.pid == first.pid
        assert node.engines() == [first.pid]
        (record,) = Records(node.data_dir).all()
        assert record.pid == first.pid


def kill_child(pid: int) -> None:
    """Kill and reap an engine that agents in this process have let go of."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def a_stranger() -> "subprocess.Popen[bytes]":
    """A process that waits for a line of input."""
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


async def test_a_process_that_got_the_pid_of_an_engine_is_neither_adopted_nor_killed(
    node: Node, plane: ControlPlane
) -> None:
    async with node.agent(leave=Leave.ORPHANED):
        await plane.assign(assigned(1, node.spec()))
        first = await plane.until_state(1, RUNNING)
    (record,) = Records(node.data_dir).all()
    assert first.pid
    kill_child(first.pid)
    with a_stranger() as stranger:
        Records(node.data_dir).put(record.model_copy(update={"pid": stranger.pid}))
        so_far = len(plane.reports)
        async with node.agent():
            again = await plane.until_state(1, RUNNING, after=so_far)
            assert again.pid not in {first.pid, stranger.pid}
            assert again.restart_count == 1
        assert stranger.poll() is None
        # The very same number and start time, but of a process that is no engine of ours.
        ticks = (platform.start_ticks(stranger.pid) or 0) - 1  # the engine's was an earlier one
        seen = {"pid": stranger.pid, "start_ticks": ticks}
        Records(node.data_dir).put(record.model_copy(update=seen))
        so_far = len(plane.reports)
        async with node.agent():
            await plane.until_state(1, RUNNING, after=so_far)
        assert stranger.poll() is None
        stranger.communicate(b"\n")


async def test_an_engine_that_overwrote_its_environment_is_adopted_not_started_twice(
    node: Node, plane: ControlPlane
) -> None:
    marker = node.folder / "real"
    (node.data_dir / "bin/llama-server").rename(marker)
    script = node.data_dir / "bin/llama-server"
    script.write_text(f'#!/bin/sh\nexec env -i {marker} "$@"\n')
    script.chmod(0o755)
    async with node.agent(leave=Leave.ORPHANED):
        await plane.assign(assigned(1, node.spec()))
        first = await plane.until_state(1, RUNNING)
    assert node.engines() == []  # by its environment it is nobody's
    so_far = len(plane.reports)
    async with node.agent():
        again = await plane.until_state(1, RUNNING, after=so_far)
        assert (again.pid, again.restart_count) == (first.pid, 0)
    assert first.pid
    assert platform.start_ticks(first.pid) is None


async def test_a_record_of_an_earlier_boot_is_nobodys(node: Node, plane: ControlPlane) -> None:
    async with node.agent(leave=Leave.ORPHANED):
        await plane.assign(assigned(1, node.spec()))
        await plane.until_state(1, RUNNING)
    (record,) = Records(node.data_dir).all()
    assert record.is_alive
    assert not record.model_copy(update={"boot_id": "another"}).is_alive
    assert not record.model_copy(update={"start_ticks": 1}).is_alive


@pytest.mark.parametrize(
    "child", [pytest.param("stubborn", marks=pytest.mark.slow), "stubborn away"]
)
async def test_what_is_left_of_a_dead_engine_is_ended_before_its_instance_starts_again(
    node: Node, plane: ControlPlane, child: str
) -> None:
    async with node.agent(leave=Leave.ORPHANED):
        await plane.assign(assigned(1, node.spec(child)))
        first = await plane.until_state(1, RUNNING)
    assert first.pid
    kill_child(first.pid)  # while no agent runs; its child ignores SIGTERM
    (left,) = node.engines()
    (record,) = Records(node.data_dir).all()
    (clear,) = adoption.find(Records(node.data_dir)).strays
    assert clear.record == record  # kept until it is gone: the next agent may have to go on
    so_far = len(plane.reports)
    async with node.agent(limits=replace(QUICK_LIMITS, stop_s=0.5)):
        while left in (seen := node.engines()):
            assert seen == [left]
            await asyncio.sleep(0.01)
        again = await plane.until_state(1, RUNNING, after=so_far)
        assert (again.pid != first.pid, again.restart_count) == (True, 1)
        assert [one.uid for one in Records(node.data_dir).all()] != [record.uid]


async def test_what_is_left_of_a_dead_engine_is_shown_and_its_instance_waits(
    node: Node, plane: ControlPlane
) -> None:
    async with node.agent(leave=Leave.ORPHANED):
        await plane.assign(assigned(1, node.spec("stubborn away")))
        first = await plane.until_state(1, RUNNING)
    assert first.pid
    kill_child(first.pid)
    (left,) = node.engines()
    membership = load_membership(node.data_dir)
    assert membership is not None
    bearer = {"Authorization": f"Bearer {membership.agent_secret}"}
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v2/engines"
    so_far = len(plane.reports)
    async with (
        node.agent(
            leave=Leave.ORPHANED, limits=replace(QUICK_LIMITS, stop_s=60), listener=listener
        ),
        httpx.AsyncClient(headers=bearer, trust_env=False) as http,
    ):
        (shown,) = (await http.get(url)).json()
        seen = (shown["instance_id"], shown["phase"], shown["instance_name"])
        assert seen == (1, "ending", plane.instances[1].name)
        assert node.engines() == [left]
        os.kill(left, signal.SIGKILL)
        await plane.until_state(1, RUNNING, after=so_far)
        (shown,) = (await http.get(url)).json()
        assert shown["phase"] == "running"


@pytest.mark.skipif(not LAST_PID.exists(), reason="only Linux lets pids begin anew")
def test_of_an_engine_without_a_pid_its_first_process_is_found_whatever_its_number(
    node: Node,
) -> None:
    records = Records(node.data_dir)
    marks = {UID_VARIABLE: "u1", HOME_VARIABLE: str(node.data_dir)}
    environment = {**os.environ, **marks}

    def process() -> "subprocess.Popen[bytes]":
        return subprocess.Popen(["sleep", "60"], env=environment, start_new_session=True)

    with process() as first:
        time.sleep(0.02)  # start times count hundredths of seconds
        try:
            LAST_PID.write_text(str(max(1, first.pid - 100)))
        except OSError:
            first.kill()
            pytest.skip("only root lets pids begin anew")
        with process() as child:
            records.put(
                Record(
                    uid="u1",
                    instance_id=1,
                    instance_name="m-1",
                    generation=1,
                    port=1,
                    argv=[],
                    secret_file="",
                    log_file="",
                    health_path="/",
                    busy_gauges=[],
                    boot_id=platform.boot_id(),
                )
            )
            (alive,) = adoption.find(records).alive
            first.kill()
            child.kill()
    if child.pid > first.pid:
        pytest.skip("every smaller number is taken")
    assert alive.pid == first.pid


async def test_a_node_that_stops_ends_what_is_left_of_dead_engines_too(
    node: Node, plane: ControlPlane
) -> None:
    async with node.agent(leave=Leave.ORPHANED):
        await plane.assign(assigned(1, node.spec("stubborn away")))
        first = await plane.until_state(1, RUNNING)
    assert first.pid
    kill_child(first.pid)
    assert len(node.engines()) == 1
    async with node.agent(limits=replace(QUICK_LIMITS, stop_s=0.2)):
        pass  # told to stop at once
    assert node.engines() == []


async def test_of_two_engines_of_one_instance_one_is_ended(node: Node, plane: ControlPlane) -> None:
    async with node.agent(leave=Leave.ORPHANED):
        await plane.assign(assigned(1, node.spec()))
        await plane.assign(assigned(2, node.spec()))
        await plane.until_state(1, RUNNING)
        await plane.until_state(2, RUNNING)
    records = Records(node.data_dir)
    for record in list(records.all()):
        records.put(record.model_copy(update={"instance_id": 1}))
    del plane.instances[2]
    found = adoption.find(records)
    assert (len(found.alive), len(found.dead), len(found.strays)) == (1, 0, 1)
    async with node.agent(leave=Leave.ORPHANED):
        await eventually(lambda: node.engines() == [found.alive[0].pid])
    assert [record.uid for record in records.all()] == [found.alive[0].uid]


async def test_a_record_of_an_earlier_boot_is_dropped_and_its_pid_left_alone(
    node: Node, plane: ControlPlane
) -> None:
    async with node.agent(leave=Leave.ORPHANED):
        await plane.assign(assigned(1, node.spec()))
        first = await plane.until_state(1, RUNNING)
    assert first.pid
    kill_child(first.pid)
    (record,) = Records(node.data_dir).all()
    so_far = len(plane.reports)
    with a_stranger() as stranger:
        # After a reboot start times begin anew: pid and start time may agree by chance.
        same = {"pid": stranger.pid, "start_ticks": platform.start_ticks(stranger.pid)}
        Records(node.data_dir).put(record.model_copy(update={**same, "boot_id": "another"}))
        async with node.agent():
            again = await plane.until_state(1, RUNNING, after=so_far)
            assert again.pid != stranger.pid
        assert stranger.poll() is None
        stranger.communicate(b"\n")


async def test_engines_of_ours_without_a_record_are_ended_and_others_are_not(
    node: Node, plane: ControlPlane
) -> None:
    def engine(home: str) -> "subprocess.Popen[bytes]":
        marks = {UID_VARIABLE: "f00", HOME_VARIABLE: home}
        return subprocess.Popen(
            ["sleep", "60"], env={**os.environ, **marks}, start_new_session=True
        )

    with engine(str(node.data_dir)) as ours, engine("/another/node") as others:
        try:
            async with node.agent():
                await eventually(lambda: ours.poll() is not None)
            assert others.poll() is None
        finally:
            others.kill()


async def test_what_a_killed_agent_had_only_begun_to_write_is_removed(
    node: Node, plane: ControlPlane
) -> None:
    records = Records(node.data_dir)
    begun = ["engines/.u1.json.abcd0123", "engines/u2.key", ".desired.json.abcd0123",
             ".attempts.json.abcd0123", ".worker_credential.abcd0123"]  # fmt: skip
    records.put_secret("of-nobody", Secret("s"))
    for name in begun:
        (node.data_dir / name).write_text("half of a secret")
    unreadable = node.data_dir / "engines/u3.json"
    unreadable.write_text("{")
    records.put_secret("u3", Secret("s"))
    async with node.agent():
        await plane.assign(assigned(1, node.spec()))
        await plane.until_state(1, RUNNING)
    assert [name for name in begun if (node.data_dir / name).exists()] == []
    assert sorted(path.name for path in (node.data_dir / "engines").iterdir()) == [
        "u3.json",  # no reader knows what it may be the record of
        "u3.key",
    ]


async def test_absence_counts_only_once_the_list_is_complete(
    node: Node, plane: ControlPlane
) -> None:
    async with node.agent(leave=Leave.ORPHANED):
        await plane.assign(assigned(1, node.spec()))
        status = await plane.until_state(1, RUNNING)
    del plane.instances[1]  # while no agent runs
    plane.refuse["GET /v2/watch"] = 503
    async with node.agent(leave=Leave.ORPHANED):
        await plane.until(lambda: len(plane.heartbeats) > 3)
        assert node.engines() == [status.pid]
    plane.refuse.clear()
    async with node.agent():
        await plane.until_state(1, GONE)
        assert node.engines() == []


async def test_with_the_server_away_the_agent_acts_on_what_it_heard_last(node: Node) -> None:
    plane = node.plane
    async with node.agent(leave=Leave.ORPHANED):
        await plane.assign(assigned(1, node.spec()))
        first = await plane.until_state(1, RUNNING)
    plane.refuse[".*"] = 503
    assert first.pid
    kill_child(first.pid)
    async with node.agent():
        await eventually(lambda: len(node.engines()) == 1)
        (pid,) = node.engines()
        os.kill(pid, signal.SIGKILL)  # and once more while it runs
        await eventually(lambda: node.engines() not in ([], [pid]))


async def test_a_server_that_comes_back_hears_where_things_stand(tmp_path: Path) -> None:
    plane = ControlPlane(free_ports(1))
    port = free_ports(11)
    node = Node(tmp_path, plane, port, port + 1)
    async with node.agent():
        async with listening(plane):
            await plane.assign(assigned(1, node.spec()))
            first = await plane.until_state(1, RUNNING)
        assert first.pid
        so_far = len(plane.reports)
        os.kill(first.pid, signal.SIGKILL)
        await eventually(lambda: node.engines() not in ([], [first.pid]))
        async with listening(plane):
            again = await plane.until_state(1, RUNNING, after=so_far)
            assert again.restart_count == 1


async def test_a_vendors_tool_that_hangs_does_not_outlive_the_next_agent_nor_a_stop(
    node: Node, plane: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "bin/cnmon"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nexec sleep 600\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")

    def running() -> set[int]:
        found = map(platform.process_environment, pids := platform.live_pids())
        return {
            pid
            for pid, each in zip(pids, found, strict=True)
            if each.get(TOOL_HOME_VARIABLE) == str(node.data_dir)
        }

    agent = await node.spawn()
    await eventually(running, limit_s=20)
    first = running()
    await agent.kill()
    assert running() == first
    agent = await node.spawn()
    await eventually(lambda: running() and not first & running(), limit_s=20)
    assert await agent.stop() == 0
    await eventually(lambda: not running(), limit_s=20)
