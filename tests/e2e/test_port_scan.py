"""What a stranger finds who scans both hosts of a running cluster: nothing but what is public."""

import asyncio
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import MakeNode
from tests.support.access import rows
from tests.support.certificate import issue
from tests.support.hosts import Host, hosts, lacking
from tests.support.node import Node
from tests.support.routes import PUBLIC, concrete
from tests.support.wait import soon

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LISTENS = "0A"
AT_ONCE = 400
PLACES = ("server", "gateway", "relay", "agent", "server-metrics", "worker-metrics")
#: What somebody sends who would like to pass for this machine's own user.
FORGED: tuple[dict[str, str], ...] = (
    {},
    {"Host": "127.0.0.1"},
    {"Host": "localhost", "X-Forwarded-For": "127.0.0.1"},
    {"X-GPUStack-Local": "1", "X-GPUStack-Peer": "127.0.0.1"},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def cluster(make_node: MakeNode, models: Path, folder: Path) -> Iterator[list[Node]]:
    """A server with a worker, and another worker, on two hosts; a model runs on each."""
    if why := lacking():
        pytest.skip(why)
    with hosts(2) as places:
        tls = issue(folder).options
        server = make_node(*tls, name="server", host=places[0])
        nodes = [server.start()]
        try:
            nodes.append(make_node(name="worker", server=server, host=places[1]).start())
            soon(lambda: ready(server) == 2, "both workers are ready", within_s=60)
            server.deploy("chat", models / "chat.gguf", replicas=2, placement_strategy="spread")
            assert all(node.engine_pids() for node in nodes)
            yield nodes
        finally:
            for node in reversed(nodes):  # before the hosts go
                node.kill()


def ready(server: Node) -> int:
    """How many workers are."""
    with server.http() as http:
        found = http.get("/v2/workers").json()["items"]
    return sum(one["state"] == "ready" for one in found)


def place_of(node: Node) -> Host:
    assert node.host is not None
    return node.host


def listeners(node: Node) -> set[int]:
    """Ports outside loopback on which something in the host's namespace listens."""
    pid = node.pids()[0]  # it is in there
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, _, port = local.partition(":")
            loopback = address in {"0100007F", "00000000000000000000000001000000"}
            if state == LISTENS and not loopback:
                found.add(int(port, 16))
    return found


async def reachable(address: str) -> set[int]:
    """Every port that takes a connection."""
    turns = asyncio.Semaphore(AT_ONCE)
    found = set()

    async def knock(port: int) -> None:
        async with turns:
            try:
                _, writer = await asyncio.open_connection(address, port)
            except OSError:
                return
        found.add(port)
        writer.close()

    async with asyncio.TaskGroup() as group:
        for port in range(1, 65536):
            group.create_task(knock(port))
    return found


def doors() -> set[tuple[str, str]]:
    """Every route of every application, as a path without placeholders."""
    routes = {row.route for place in PLACES for row in rows(place)}
    listed = {("POST" if method == "*" else method, concrete(path)) for method, path in routes}
    return listed | {("GET", path) for path in ("/", "/metrics", "/admin", "/ui", "/v2/nothing")}


async def open_doors(address: str, port: int) -> list[str]:
    """What a port answers that it should not, by HTTP and by HTTPS."""
    found, heard = [], 0
    anybody = ssl.create_default_context()
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    for scheme in ("http", "https"):
        place = f"{scheme}://{address}:{port}"
        async with httpx.AsyncClient(
            base_url=place, verify=anybody, trust_env=False, timeout=60
        ) as http:
            try:
                await http.get("/healthz")
            except httpx.TransportError:
                continue  # it speaks the other
            heard += 1
            for method, path in sorted(doors()):
                for headers in FORGED:
                    answer = await http.request(method, path, headers=dict(headers))
                    if path not in PUBLIC and answer.status_code not in {401, 403, 404, 405}:
                        found.append(f"{method} {place}{path} {headers}: {answer.status_code}")
    return found if heard else [f"{address}:{port} speaks neither HTTP nor HTTPS: what is it?"]


async def test_a_port_scan_finds_nothing_that_answers_a_stranger(cluster: list[Node]) -> None:
    server, worker = cluster
    assert listeners(server) == {server.port, server.tls_port, server.worker_port,
                                 server.metrics_port, server.worker_metrics_port}  # fmt: skip
    assert listeners(worker) == {worker.worker_port, worker.worker_metrics_port}
    wrong = []
    for node in cluster:
        address = place_of(node).address
        ports = await reachable(address)
        assert ports == listeners(node), f"{address} is reached at other ports than listen there"
        for port in sorted(ports):
            wrong += await open_doors(address, port)
    assert not wrong, "\n".join(wrong)
