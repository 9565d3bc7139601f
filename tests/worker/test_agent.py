import asyncio

from gpustack.schemas.instances import InstanceState
from tests.support.control_plane import ControlPlane, assigned


async def test_an_instance_is_started_and_reported_state_by_state(node, plane: ControlPlane) -> None:
    async with node.agent():
        await plane.assign(assigned(1, node.spec()))
        status = await plane.until_state(1, InstanceState.RUNNING)
        assert plane.states(1) == ["starting", "running"]
        assert status.pid in node.engines()
        await plane.change(1, deleting=True, generation=2)
        await plane.until_state(1, InstanceState.GONE)
        assert node.engines() == []
