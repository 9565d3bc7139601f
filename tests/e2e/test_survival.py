"""What runs keeps running when what manages it is killed."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from openai import APIConnectionError, APIStatusError, InternalServerError

from tests.e2e.conftest import MakeNode
from tests.support.node import Node
from tests.support.streams import Stream, client, load, running_streams
from tests.support.wait import eventually

SLOW, HERE, THERE = "slow", "here", "there"


@pytest.fixture(scope="module")
def second(node: Node, make_node: MakeNode) -> Node:
    """A worker-only node; models with the selector place=second go there."""
    return make_node("--worker-labels", "place=second", name="second", server=node).start()


@pytest.fixture(scope="module")
def served(node: Node, second: Node, models: Path) -> Node:
    # Threads of two engines that spin on the same two cores would wait for each other.
    for name, selector in ((SLOW, {"worker": "server"}), (THERE, {"place": "second"})):
        node.deploy(
            name,
            models / "slow.gguf",
            worker_selector=selector,
            backend_parameters=["--threads=1", "--threads-batch=1"],
        )
    return node


@pytest.fixture(scope="module")
def node(make_node: MakeNode) -> Node:
    return make_node("--worker-labels", "worker=server").start()


@pytest.fixture(scope="module")
def key(served: Node) -> str:
    return served.api_key()


@contextlib.asynccontextmanager
async def states_of(node: Node, name: str) -> AsyncIterator[set[str]]:
    """Every state that the API shows of a model's instances meanwhile."""
    seen: set[str] = set()
    stop = asyncio.Event()
    with node.http() as http:
        model_id = http.get("/v2/models", params={"name": name}).json()["items"][0]["id"]

    async def look() -> None:
        while not stop.is_set():
            found = await asyncio.to_thread(node.instances, model_id)
            seen.update(one["state"] for one in found)
            await asyncio.sleep(0.02)

    async with asyncio.TaskGroup() as group:
        group.create_task(look())
        yield seen
        stop.set()


async def new_role(node: Node, role: str, old: int) -> int:
    """The pid of the process that took the place of `old`."""

    async def started() -> int:
        return next((pid for pid in node.pids(role) if pid != old), 0)

    return await eventually(started, f"{role} is started again")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "place"), [(SLOW, "node"), (THERE, "second")])
async def test_the_death_of_an_agent_cuts_no_stream_and_its_engine_is_adopted(
    served: Node, second: Node, key: str, model: str, place: str
) -> None:
    owner = {"node": served, "second": second}[place]
    engines = owner.engine_pids()
    assert engines
    async with states_of(served, model) as seen, running_streams(served, key, model):
        old = owner.kill_role("agent")
        await new_role(owner, "agent", old)
    assert owner.engine_pids() == engines
    assert seen == {"running"}
    async with client(served, key) as openai:
        assert (await Stream().run(openai, model, "afterwards", max_tokens=4)).whole
    # The new agent is its owner: when the engine dies, it is started again.
    async with states_of(served, model):
        os.kill(engines[0], signal.SIGKILL)

        async def again() -> bool:
            fresh = owner.engine_pids()
            return bool(fresh) and fresh != engines

        await eventually(again, "the adopted engine is started again", within_s=30)
    with served.http() as http:
        model_id = http.get("/v2/models", params={"name": model}).json()["items"][0]["id"]
    served.wait_instances(model_id, lambda found: found[0]["state"] == "running", "running again")


async def test_the_death_of_the_server_stops_nobody_and_known_keys_are_served(
    served: Node, key: str
) -> None:
    assert served.process is not None
    async with running_streams(served, key, SLOW), client(served, key) as openai:
        # The launcher is held still, so that the server stays away for as long as we look.
        os.kill(served.process.pid, signal.SIGSTOP)
        try:
            old = served.kill_role("server")
            for number in range(5):
                stream = await Stream().run(openai, THERE, f"away {number}", max_tokens=4)
                assert stream.whole
            assert (await openai.models.list()).data
            async with client(served, "gpustack_unknown") as stranger:
                with pytest.raises(InternalServerError, match="503"):
                    await stranger.models.list()
        finally:
            os.kill(served.process.pid, signal.SIGCONT)
        await new_role(served, "server", old)

    async def back() -> bool:
        def models() -> int:
            with served.http() as http:
                return http.get("/v2/models").status_code

        return await asyncio.to_thread(models) == 200

    await eventually(back, "the server is back")


async def test_the_death_of_a_gateway_leaves_the_other_and_comes_back(
    served: Node, key: str
) -> None:
    before = len(served.pids("gateway"))
    old = served.kill_role("gateway")
    await new_role(served, "gateway", old)

    async def all_there() -> bool:
        return len(served.pids("gateway")) == before

    await eventually(all_there, "every gateway is back")
    async with client(served, key, retries=2) as openai:
        assert (await Stream().run(openai, SLOW, "after", max_tokens=4)).whole


@pytest.mark.slow
async def test_a_restart_under_load_costs_no_request_and_no_engine(served: Node, key: str) -> None:
    engines = served.engine_pids()
    pid = served.said()["pid"]
    async with load(served, key, THERE) as failures, running_streams(served, key, SLOW, 2):
        command = [sys.executable, "-m", "gpustack", "restart", "--data-dir", str(served.data_dir)]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr + served.log.read_bytes()[-3000:]
    assert failures == []
    assert served.engine_pids() == engines
    assert served.said()["pid"] == pid
    assert served.said()["ready"] is True


async def test_a_launcher_that_is_killed_leaves_the_engines_and_the_next_one_adopts_them(
    served: Node, second: Node, key: str
) -> None:
    assert second.process is not None
    engines = second.engine_pids()
    async with running_streams(served, key, THERE):
        second.process.kill()
        second.process.wait()

    async def roles_left() -> bool:
        return not second.pids()

    await eventually(roles_left, "agent and relay end without their launcher")
    assert second.engine_pids() == engines
    await asyncio.to_thread(second.start)
    async with client(served, key) as openai:

        async def answers() -> bool:
            with contextlib.suppress(APIStatusError, APIConnectionError):
                return (await Stream().run(openai, THERE, "again", max_tokens=4)).whole
            return False

        await eventually(answers, "the adopted engine answers through the new relay")
    assert second.engine_pids() == engines
