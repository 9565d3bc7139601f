import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gpustack.client.agents import AgentClient
from gpustack.errors import Unauthorized
from gpustack.schemas.instances import InstanceState, InstanceStatus, can_move
from gpustack.schemas.models import Source, VersionSpec
from gpustack.worker.reports import Reports
from tests.support.control_plane import ControlPlane, assigned
from tests.support.worker_node import eventually

SPEC = VersionSpec(source=Source.LOCAL_PATH, local_path="/m.gguf")
STATE = InstanceState


class Told:
    """What a control would be told."""

    def __init__(self, echo_s: float = 5.0) -> None:
        self.ended: list[int] = []
        self.unknown: list[int] = []
        self.reports = Reports(self.ended.append, self.unknown.append, echo_s=echo_s)

    def put(self, id: int, state: InstanceState, message: str = "") -> None:
        self.reports.put(id, InstanceStatus(state=state, state_message=message))


@asynccontextmanager
async def sending(told: Told, plane: ControlPlane) -> AsyncIterator[None]:
    async with AgentClient(plane.url, plane.credential) as client, asyncio.TaskGroup() as group:
        task = group.create_task(told.reports.send(client, first_s=0.01, limit_s=0.05))
        yield
        task.cancel()


async def test_only_what_changed_is_said(plane: ControlPlane) -> None:
    await plane.assign(assigned(1, SPEC))
    told = Told()
    async with sending(told, plane):
        for _ in range(3):
            told.put(1, STATE.STARTING)
            await plane.until(lambda: plane.reports)
        told.put(1, STATE.RUNNING)
        await plane.until_state(1, STATE.RUNNING)
    assert [status.state for _, status in plane.reports] == ["starting", "running"]


async def test_with_the_server_away_the_newest_is_kept_and_said_along_legal_moves(
    plane: ControlPlane,
) -> None:
    await plane.assign(assigned(1, SPEC))
    told = Told()
    async with sending(told, plane):
        told.put(1, STATE.STARTING)
        await plane.until_state(1, STATE.STARTING)
        told.put(1, STATE.ERROR)
        await plane.until_state(1, STATE.ERROR)
        plane.refuse[".*"] = 503
        for state in (STATE.STARTING, STATE.RUNNING, STATE.ERROR, STATE.STARTING, STATE.RUNNING):
            told.put(1, state)
            await asyncio.sleep(0.01)
        plane.refuse.clear()
        await plane.until_state(1, STATE.RUNNING)
    states = [STATE.SCHEDULED, *plane.states(1)]
    assert states[1:] == ["starting", "error", "starting", "running"]
    assert all(can_move(old, new) for old, new in itertools.pairwise(states))


async def test_what_the_server_shows_decides_when_this_agent_has_said_nothing_yet(
    plane: ControlPlane,
) -> None:
    instance = assigned(1, SPEC, state=STATE.ERROR)
    await plane.assign(instance)
    told = Told()
    told.reports.hear(instance)
    async with sending(told, plane):
        told.put(1, STATE.RUNNING)
        await plane.until_state(1, STATE.RUNNING)
    assert plane.states(1) == ["starting", "running"]


async def test_a_move_that_the_server_finds_illegal_is_made_in_two_steps(
    plane: ControlPlane,
) -> None:
    await plane.assign(assigned(1, SPEC, state=STATE.ERROR))
    plane.strict = True
    told = Told()
    async with sending(told, plane):
        told.put(1, STATE.RUNNING)  # of its error this agent has never heard
        await plane.until(lambda: plane.instances[1].state is STATE.RUNNING)
    assert plane.states(1) == ["running", "starting", "running"]


async def test_gone_is_kept_until_the_server_knows(plane: ControlPlane) -> None:
    await plane.assign(assigned(1, SPEC, deleting=True))
    told = Told()
    plane.refuse[".*"] = 503
    async with sending(told, plane):
        told.put(1, STATE.GONE)
        await plane.until(lambda: plane.refused >= 2)
        assert told.ended == []
        plane.refuse.clear()
        await plane.until_state(1, STATE.GONE)
        await eventually(lambda: told.ended == [1])


async def test_an_instance_that_the_server_does_not_know_is_named(plane: ControlPlane) -> None:
    told = Told()
    async with sending(told, plane):
        told.put(9, STATE.RUNNING)
        await plane.until(lambda: plane.reports)
        told.put(8, STATE.GONE)
        await plane.until(lambda: len(plane.reports) == 2)
    assert 9 in told.unknown


async def test_what_the_server_shows_wrong_is_said_again(plane: ControlPlane) -> None:
    await plane.assign(assigned(1, SPEC))
    told = Told(echo_s=0.05)
    async with sending(told, plane):
        told.put(1, STATE.STARTING)
        told.put(1, STATE.RUNNING)
        await plane.until_state(1, STATE.RUNNING)
        so_far = len(plane.reports)
        lost = assigned(1, SPEC, state=STATE.UNREACHABLE)

        def heard_again() -> bool:
            told.reports.hear(lost)
            return len(plane.reports) > so_far

        await eventually(heard_again)
    assert plane.reports[-1][1].state is STATE.RUNNING


async def test_what_the_server_has_lost_sight_of_is_said_again_at_once(
    plane: ControlPlane,
) -> None:
    """Whatever it knew before: unreachable goes to any state."""
    await plane.assign(assigned(1, SPEC))
    told = Told(echo_s=60)
    async with sending(told, plane):
        told.put(1, STATE.ERROR, "boom")
        await plane.until_state(1, STATE.ERROR)
        so_far = len(plane.reports)
        told.reports.hear(assigned(1, SPEC, state=STATE.UNREACHABLE))
        told.put(1, STATE.RUNNING)
        await plane.until_state(1, STATE.RUNNING)
        told.reports.hear(assigned(1, SPEC, state=STATE.UNREACHABLE))
        await plane.until(lambda: len(plane.reports) == so_far + 2)
    assert [status.state for _, status in plane.reports[so_far:]] == ["running", "running"]


async def test_an_echo_of_an_earlier_report_changes_nothing(plane: ControlPlane) -> None:
    await plane.assign(assigned(1, SPEC))
    told = Told(echo_s=60)
    async with sending(told, plane):
        told.put(1, STATE.STARTING)
        await plane.until_state(1, STATE.STARTING)
        told.put(1, STATE.RUNNING)
        await plane.until_state(1, STATE.RUNNING)
        for _ in range(20):
            told.reports.hear(assigned(1, SPEC, state=STATE.STARTING))
            await asyncio.sleep(0)
    assert [status.state for _, status in plane.reports] == ["starting", "running"]


async def test_a_credential_that_is_not_known_ends_the_talk(plane: ControlPlane) -> None:
    told = Told()
    told.put(1, STATE.RUNNING)
    async with AgentClient(plane.url, "nobody's") as client:
        with pytest.raises(Unauthorized):
            await told.reports.send(client)
