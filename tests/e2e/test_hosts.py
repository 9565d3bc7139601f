"""A cluster of two hosts with addresses of their own."""

import asyncio
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpustack.lib import trust
from tests.e2e.conftest import MakeNode
from tests.support.certificate import Issued, issue
from tests.support.hosts import Host, hosts, lacking
from tests.support.node import Node
from tests.support.streams import Stream, client, running_streams
from tests.support.wait import eventually, soon

pytestmark = pytest.mark.slow

REMOTE = "remote"

CABLE_OUT_S = 2.0

SO_RCVBUFFORCE = 33  # beyond what the system allows: the reader may have to wait for a core


@pytest.fixture(scope="module")
def places() -> Iterator[list[Host]]:
    if why := lacking():
        pytest.skip(why)
    with hosts(2) as made:
        yield made


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Issued:
    """A certificate for other addresses than the server's, which nobody vouches for."""
    return issue(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def server(make_node: MakeNode, places: list[Host], issued: Issued) -> Node:
    address = ("--advertise-address", places[0].address)
    options = ("--disable-worker", *issued.options, *address)
    return make_node(*options, name="server", host=places[0]).start()


@pytest.fixture(scope="module")
def worker(make_node: MakeNode, server: Node, places: list[Host]) -> Node:
    """It has joined with the command that the server's `token create` prints."""
    made = subprocess.run(
        [*places[0].command, sys.executable, "-m", "gpustack", "token", "create"],
        env=os.environ | {"GPUSTACK_DATA_DIR": str(server.data_dir)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    gpustack, start, *options = shlex.split(made.stdout)
    assert (gpustack, start) == ("gpustack", "start")
    assert options[1] == f"https://{places[0].address}:{server.tls_port}"
    assert options[4] == "--server-fingerprint"
    node = make_node(*options, name="worker", server=server, host=places[1]).start()
    soon(lambda: states(server) == ["ready"], "the worker is ready", within_s=60)
    return node


def states(server: Node) -> list[str]:
    with server.http() as http:
        return [one["state"] for one in http.get("/v2/workers").json()["items"]]


@contextlib.contextmanager
def captured(link: str) -> Iterator[bytearray]:
    """What crosses a host's cable, frame after frame."""
    seen, over = bytearray(), threading.Event()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3)) as sock:
        sock.bind((link, 0))
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 26)
        sock.settimeout(0.1)

        def read() -> None:
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    seen.extend(sock.recv(65536))

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield seen
        finally:
            over.set()
            reader.join()


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


async def test_a_stream_crosses_hosts_and_survives_the_agents_death_and_a_loose_cable(
    server: Node, worker: Node, key: str, places: list[Host]
) -> None:
    engines = worker.engine_pids()
    async with running_streams(server, key, REMOTE, 2):
        os.kill(worker.pids("agent")[0], signal.SIGKILL)
        places[1].cut()
        try:
            await asyncio.sleep(CABLE_OUT_S)
        finally:
            places[1].heal()
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


async def test_nothing_that_crosses_between_hosts_can_be_read_on_the_way(
    server: Node, worker: Node, key: str, places: list[Host]
) -> None:
    """Of requests, logs, and all that an agent says when it starts."""
    membership = json.loads((worker.data_dir / "worker_credential").read_text())
    secrets = [
        membership["credential"],
        membership["agent_secret"],
        *(file.read_text().strip() for file in (worker.data_dir / "engines").glob("*.key")),
    ]
    assert len(secrets) > 2
    prompt = "a prompt that nobody else sends"
    with captured(places[0].link) as clients, captured(places[1].link) as between:
        async with client(server, key) as api:
            assert (await Stream().run(api, REMOTE, prompt, max_tokens=3)).whole
        with server.http() as http:
            (instance,) = http.get("/v2/model-instances").json()["items"]
            log = http.get(f"/v2/model-instances/{instance['id']}/logs").content
            assert len(log) > 100
        said = worker.log.read_text().count("worker 1 of cluster")
        worker.kill_role("agent")
        again = "the new agent is known"
        soon(lambda: worker.log.read_text().count("worker 1 of cluster") > said, again, within_s=60)
        soon(lambda: prompt.encode() in clients, "the client's own request is seen, in clear")
    assert len(between) > len(log)
    for readable in (prompt, *secrets, "HTTP/1.1", "content-type", log[:60].decode()):
        assert readable.encode() not in between


def test_a_server_with_another_key_is_refused_and_what_runs_goes_on(
    server: Node, worker: Node, key: str, issued: Issued, tmp_path: Path
) -> None:
    engines, was = worker.engine_pids(), trust.fingerprint(issued.der)
    issued.replace_by(issue(tmp_path, "other"))
    assert server.process is not None
    server.process.send_signal(signal.SIGHUP)
    soon(
        lambda: "the certificate was read again" in server.log.read_text(),
        "it is shown",
        within_s=30,
    )
    worker.kill_role("agent")
    said = f"its key has fingerprint {trust.fingerprint(issued.der)}, not {was}: if the server"
    soon(lambda: said in worker.log.read_text(), "the worker says so", within_s=30)
    assert "Traceback" not in worker.log.read_text()
    assert worker.engine_pids() == engines
