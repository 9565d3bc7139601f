"""A cluster of two hosts with addresses of their own."""

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeNode
from tests.support.hosts import Host, hosts, lacking
from tests.support.node import Node
from tests.support.streams import Stream, client, running_streams
from tests.support.wait import eventually

pytestmark = pytest.mark.slow

REMOTE = "remote"


@pytest.fixture(scope="module")
def places() -> Iterator[list[Host]]:
    if why := lacking():
        pytest.skip(why)
    with hosts(2) as made:
        yield made


@pytest.fixture(scope="module")
def server(make_node: MakeNode, places: list[Host]) -> Node:
    return make_node("--disable-worker", name="server", host=places[0]).start()


@pytest.fixture(scope="module")
def worker(make_node: MakeNode, server: Node, places: list[Host]) -> Node:
    return make_node(name="worker", server=server, host=places[1]).start()


@pytest.fixture(scope="module")
def key(server: Node, worker: Node, models: Path) -> str:
    server.deploy(
        REMOTE, models / "slow.gguf", backend_parameters=["--threads=1", "--threads-batch=1"]
    )
    return server.api_key()


def reachable(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=2):
            return True
    except OSError:
        return False


async def test_a_stream_crosses_hosts_and_survives_the_agents_death(
    server: Node, worker: Node, key: str
) -> None:
    engines = worker.engine_pids()
    async with running_streams(server, key, REMOTE, 2):
        os.kill(worker.pids("agent")[0], signal.SIGKILL)
    assert worker.engine_pids() == engines


def test_only_the_relay_can_be_reached_from_another_host(
    server: Node, worker: Node, key: str, places: list[Host]
) -> None:
    address = places[1].address
    first, last = worker.engine_ports
    assert reachable(address, worker.worker_port)
    assert [port for port in range(first, last + 1) if reachable(address, port)] == []
    assert not reachable(places[0].address, server.api_port)


async def test_a_worker_that_was_cut_off_serves_again_when_the_cable_is_back(
    server: Node, worker: Node, key: str, places: list[Host]
) -> None:
    engines = worker.engine_pids()
    places[1].cut()
    try:
        async with client(server, key) as api:
            with pytest.raises(Exception, match=r"50[23]"):
                async with asyncio.timeout(60):
                    await Stream().run(api, REMOTE, "into the void", max_tokens=2)
    finally:
        places[1].heal()

    async def answers() -> bool:
        async with client(server, key, retries=2) as api:
            return (await Stream().run(api, REMOTE, "back", max_tokens=2)).whole

    await eventually(answers, "the worker serves again", within_s=60)
    assert worker.engine_pids() == engines
