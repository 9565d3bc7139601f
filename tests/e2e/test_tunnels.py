"""A worker that no server can dial, and two gateway processes: requests go through its tunnels.

The worker advertises an address to which its server has no route, as behind a NAT or a firewall.
"""

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAIError

from tests.e2e.conftest import MakeNode
from tests.support.hosts import NETWORK, Host, hosts, lacking
from tests.support.node import Node
from tests.support.streams import Stream, client, load, running_streams
from tests.support.wait import eventually, soon

pytestmark = pytest.mark.slow

MODEL = "remote"
HIDDEN = f"{NETWORK.removesuffix('.0')}.1.2"
MADE = "has a tunnel to this process"


@pytest.fixture(scope="module")
def places() -> Iterator[list[Host]]:
    if why := lacking():
        pytest.skip(why)
    with hosts(2) as made:
        ip(made[1], "addr", "add", f"{HIDDEN}/32", "dev", "lo")
        yield made


def ip(host: Host, *words: str) -> None:
    subprocess.run([*host.command, "ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def server(make_node: MakeNode, places: list[Host]) -> Node:
    options = ("--disable-worker", "--gateway-concurrency", "2")
    return make_node(*options, name="server", host=places[0]).start()


@pytest.fixture(scope="module")
def worker(make_node: MakeNode, server: Node, places: list[Host]) -> Node:
    options = ("--advertise-address", HIDDEN, "--proxy-mode", "tunnel")
    node = make_node(*options, name="worker", server=server, host=places[1]).start()
    soon(lambda: said(server)["state"] == "ready", "the worker is ready", within_s=60)
    return node


@pytest.fixture(scope="module")
def key(server: Node, worker: Node, models: Path) -> str:
    server.deploy(
        MODEL, models / "slow.gguf", backend_parameters=["--threads=1", "--threads-batch=1"]
    )
    soon(lambda: server.log.read_text().count(MADE) == 2, "a tunnel to each process", within_s=30)
    return server.api_key()


def said(server: Node) -> dict[str, Any]:
    """What the server says of the only worker."""
    with server.http() as http:
        found = http.get("/v2/workers").json()["items"]
    return dict(found[0]) if found else {"state": ""}


async def answers(server: Node, key: str) -> bool:
    try:
        async with client(server, key) as api:
            return (await Stream().run(api, MODEL, "hello", max_tokens=2)).whole
    except OpenAIError:
        return False


async def serves(server: Node, key: str) -> None:
    """Whichever process is asked, soon: each connection reaches another."""

    async def all_do() -> bool:
        return all(await asyncio.gather(*(answers(server, key) for _ in range(8))))

    await eventually(all_do, "requests are answered", within_s=40)


def log_of(server: Node) -> str:
    with server.http() as http:
        (instance,) = http.get("/v2/model-instances").json()["items"]
        answer = http.get(f"/v2/model-instances/{instance['id']}/logs")
    assert answer.status_code == 200, answer.text
    return answer.text


async def test_requests_logs_and_log_levels_go_through_tunnels(
    server: Node, worker: Node, key: str
) -> None:
    its = said(server)
    assert (its["ip"], its["proxy_mode"], its["reached_by"]) == (HIDDEN, "tunnel", "tunnel")
    await serves(server, key)
    assert len(log_of(server)) > 100
    with server.http() as http:
        assert http.get(f"/v2/workers/{its['id']}/log-level").text.strip() == "INFO"


async def test_streams_go_on_when_the_agent_and_the_server_die(
    server: Node, worker: Node, key: str
) -> None:
    async with running_streams(server, key, MODEL, 2, max_tokens=150):
        worker.kill_role("agent")
        server.kill_role("server")


async def test_tunnels_come_back_when_the_relay_or_a_gateway_died(
    server: Node, worker: Node, key: str
) -> None:
    worker.kill_role("relay")
    await serves(server, key)
    server.kill_role("gateway")
    made = server.log.read_text().count(MADE)
    soon(lambda: server.log.read_text().count(MADE) > made, "the new process's", within_s=30)
    await serves(server, key)


async def test_requests_and_streams_go_on_while_the_nodes_are_replaced(
    server: Node, worker: Node, key: str
) -> None:
    async with (
        running_streams(server, key, MODEL, 2, max_tokens=150),
        load(server, key, MODEL, 2) as failures,
    ):
        for node in (server, worker):
            await replaced(node)
    assert failures == []


async def replaced(node: Node) -> None:
    """As `gpustack restart` does it."""
    before = node.said()["life"]
    assert node.process is not None
    node.process.send_signal(signal.SIGUSR2)

    async def other() -> bool:
        return node.said().get("life") not in {None, before}

    await eventually(other, "a new launcher took its place", within_s=40)


async def test_with_the_server_away_known_models_are_served_and_tunnels_made(
    server: Node, worker: Node, key: str
) -> None:
    (pid,) = server.pids("server")
    os.kill(pid, signal.SIGSTOP)
    try:
        await serves(server, key)
        worker.kill_role("agent")
        worker.kill_role("relay")
        for _ in server.pids("gateway"):
            server.kill_role("gateway")
        await serves(server, key)
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_a_worker_finds_out_by_itself_and_goes_back_when_it_can_be_dialled(
    server: Node, worker: Node, key: str, places: list[Host]
) -> None:
    worker.stop()
    at = worker.arguments.index("--proxy-mode")
    del worker.arguments[at : at + 2]
    worker.start()
    message = f"it cannot be reached at {HIDDEN}:{worker.worker_port} from the server ("

    def by_tunnel() -> bool:
        its = said(server)
        return (its["reached_by"], its["proxy_mode"]) == ("tunnel", "direct")

    soon(by_tunnel, "the server has seen that it cannot dial the worker", within_s=60)
    assert said(server)["state_message"].startswith(message)
    await serves(server, key)
    assert len(log_of(server)) > 100
    ip(places[0], "route", "add", f"{HIDDEN}/32", "via", places[1].address)
    soon(lambda: said(server)["reached_by"] == "direct", "the worker can be dialled", within_s=60)
    membership = worker.data_dir / "worker_credential"
    soon(lambda: "tunnel" not in json.loads(membership.read_text()), "it knows", within_s=30)
    await serves(server, key)
    assert len(log_of(server)) > 100


async def test_one_process_that_is_server_and_gateway_has_tunnels_too(
    make_node: MakeNode, places: list[Host], models: Path
) -> None:
    options = ("--disable-worker", "--gateway-mode", "disabled")
    server = make_node(*options, name="one", host=places[0]).start()
    behind = ("--advertise-address", HIDDEN, "--proxy-mode", "tunnel")
    worker = make_node(*behind, name="its-worker", server=server, host=places[1]).start()
    soon(lambda: said(server)["state"] == "ready", "the worker is ready", within_s=60)
    server.deploy(MODEL, models / "chat.gguf")
    key = server.api_key()
    await serves(server, key)
    assert len(log_of(server)) > 100
    server.kill_role("server+gateway")
    await serves(server, key)
    assert worker.stop() == 0
