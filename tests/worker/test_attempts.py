from dataclasses import replace
from pathlib import Path

import pytest

from gpustack.lib import platform
from gpustack.lib.role import Leave
from gpustack.schemas.instances import InstanceState
from gpustack.worker.attempts import Memory
from gpustack.worker.reconcile import Attempts, Failure, Policy, Trouble, after_failure
from tests.support.control_plane import ControlPlane, assigned
from tests.support.worker_node import Node

ERROR = InstanceState.ERROR


def failed() -> Attempts:
    crash = Failure(Trouble.EXITED, "the engine exited with code 1", "boom", code=1)
    return after_failure(None, crash, generation=1, restart_count=2, now=50.0, policy=Policy())


def test_what_was_remembered_is_remembered_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "attempts.json"
    memory = Memory(path)
    memory.put(1, failed())
    memory.put(2, failed())
    memory.forget(2)
    memory.save()
    assert path.stat().st_mode & 0o777 == 0o600
    after = Memory(path)
    after.load()
    assert after.attempts == {1: failed()}


def test_after_a_boot_the_clock_is_another_and_nothing_waits(tmp_path: Path) -> None:
    path = tmp_path / "attempts.json"
    memory = Memory(path)
    memory.put(1, failed())
    memory.save()
    path.write_text(path.read_text().replace(platform.boot_id(), "another"))
    memory.load()
    assert memory.attempts == {1: replace(failed(), retry_at=0.0)}


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"boot_id": "x", "attempts": {"1": 5}}'])
def test_a_file_that_cannot_be_read_is_no_end(content: str, tmp_path: Path) -> None:
    path = tmp_path / "attempts.json"
    path.write_text(content)
    memory = Memory(path)
    memory.load()
    assert memory.attempts == {}


async def test_a_new_agent_does_not_start_what_must_not_restart_or_is_to_wait(
    node: Node, plane: ControlPlane
) -> None:
    once, thrice = node.folder / "once", node.folder / "thrice"
    once.touch()
    thrice.touch()
    policy = Policy(first_s=0.05, limit_s=60)
    async with node.agent(leave=Leave.ORPHANED, policy=policy):
        await plane.assign(assigned(1, node.spec(f"exit-if={once}"), restart_on_error=False))
        await plane.assign(assigned(2, node.spec(f"exit-if={thrice}")))
        await plane.until_state(1, ERROR)
        await plane.until(lambda: any("3 times alike" in s.state_message for _, s in plane.reports))
    once.unlink()
    thrice.unlink()
    so_far = len(plane.reports)
    async with node.agent(policy=policy):
        first = await plane.until_state(1, ERROR, after=so_far)
        second = await plane.until_state(2, ERROR, after=so_far)
        assert "exited with code 1" in first.state_message
        assert "3 times alike" in second.state_message
        assert node.engines() == []
        assert {status.state for _, status in plane.reports[so_far:]} == {ERROR}
        await plane.change(2, generation=2)  # a person asks for it
        assert (await plane.until_state(2, InstanceState.RUNNING)).restart_count == 3


async def test_starts_are_counted_on_across_agents(node: Node, plane: ControlPlane) -> None:
    broken = node.folder / "broken"
    broken.touch()
    async with node.agent():
        await plane.assign(assigned(1, node.spec(f"exit-if={broken}")))
        await plane.until_state(1, ERROR)
        broken.unlink()
        assert (await plane.until_state(1, InstanceState.RUNNING)).restart_count == 1
    so_far = len(plane.reports)
    async with node.agent():
        again = await plane.until_state(1, InstanceState.RUNNING, after=so_far)
        assert again.restart_count == 2
    assert [s.restart_count for _, s in plane.reports if "was stopped" in s.state_message] == [1, 2]
