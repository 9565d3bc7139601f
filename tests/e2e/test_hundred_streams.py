"""A hundred streams run while what manages their engine is killed: each arrives token by token."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest

from tests.support import fake_engine
from tests.support.cluster import Cluster
from tests.support.hosts import hosts, lacking
from tests.support.inspection import problems
from tests.support.node import Node
from tests.support.streams import Stream, running_streams

pytestmark = pytest.mark.slow

STREAMS = 100
#: Of each stream: far more than arrive, at this pace, before it may hurry.
TOKENS, PACE_S = 120, 0.75
WANTED = {"here": 1, "there": 1}


@pytest.fixture(scope="module")
def hurry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While this file is there, the engines do not pace their streams."""
    return tmp_path_factory.mktemp("streams") / "hurry"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, hurry: Path) -> Iterator[Cluster]:
    """Model `here` runs on the server's host, `there` on the other."""
    if why := lacking():
        pytest.skip(why)
    with hosts(2) as places:
        made = Cluster(tmp_path_factory.mktemp("hosts"), places, ports=4)
        try:
            made.start()
            for name, host in (("here", "host1"), ("there", "host2")):
                told = f"pace={PACE_S} hurry-if={hurry}"
                made.deploy(name, fake=told, selector={"place": host})
            yield made
        finally:
            made.end()


@pytest.fixture(autouse=True)
def paced(hurry: Path) -> Iterator[None]:
    yield
    hurry.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def streams(cluster: Cluster, hurry: Path, *models: str) -> AsyncIterator[None]:
    """A hundred of each model, which go on until the context ends; then each must be whole."""
    key = cluster.server.api_key()
    async with contextlib.AsyncExitStack() as stack:
        running: list[Sequence[Stream]] = []
        for model in models:
            begun = running_streams(cluster.server, key, model, STREAMS, max_tokens=TOKENS)
            running.append(await stack.enter_async_context(begun))
        yield
        ended = [stream for each in running for stream in each if stream.finish_reason]
        assert not ended, "these were over before they were to hurry"
        await asyncio.to_thread(hurry.touch)
    for each in running:
        for number, stream in enumerate(each):
            assert stream.text == fake_engine.words(f"stream number {number}", TOKENS)


async def rest(cluster: Cluster) -> None:
    found: list[str] = []

    def is_well() -> bool:
        found[:] = problems(cluster, WANTED)
        return not found

    assert await asyncio.to_thread(cluster.until, is_well, 60), "\n".join(found)


def kill(cluster: Cluster, node: Node, kind: str) -> None:
    for process in cluster.processes():
        if process.kind == kind and process.home == str(node.data_dir):
            os.kill(process.pid, signal.SIGKILL)


async def test_the_death_of_the_agents_breaks_none_of_a_hundred_streams_on_each_host(
    cluster: Cluster, hurry: Path
) -> None:
    await rest(cluster)
    engines = [node.engine_pids() for node in cluster.nodes]
    async with streams(cluster, hurry, "here", "there"):
        for node in cluster.nodes:
            kill(cluster, node, "agent")
        await rest(cluster)  # new agents have taken the engines over
    assert [node.engine_pids() for node in cluster.nodes] == engines


async def test_the_death_of_a_workers_launcher_breaks_none_of_a_hundred_streams(
    cluster: Cluster, hurry: Path
) -> None:
    await rest(cluster)
    node = cluster.nodes[1]
    engines = node.engine_pids()
    old = {process.pid for process in cluster.processes() if process.home == str(node.data_dir)}
    async with streams(cluster, hurry, "there"):
        kill(cluster, node, "launcher")

        def is_back() -> bool:
            """A new relay serves beside the old one, which only finishes its streams."""
            relays = [one for one in cluster.processes() if one.kind == "relay"]
            said = node.said()
            is_ready = node.process is not None and said.get("pid") == node.process.pid
            is_ready = is_ready and bool(said.get("ready"))
            return is_ready and any(one.pid not in old for one in relays)

        assert await asyncio.to_thread(cluster.until, is_back, 60)
        relays = [one.pid for one in cluster.processes() if one.kind == "relay"]
        assert old & {*relays}, "nobody finishes the streams"
    await rest(cluster)
    assert node.engine_pids() == engines
