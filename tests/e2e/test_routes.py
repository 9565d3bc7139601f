"""Who may call which route of every application of a real node: `tests/support/access.txt`."""

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from fastapi import APIRouter, FastAPI

from gpustack.forward import metrics
from gpustack.gateway import app as gateway_app
from gpustack.gateway import relay
from gpustack.server.app import create_app
from gpustack.server.auth.known import Known
from gpustack.server.db.database import Database
from gpustack.server.feed import Feed
from gpustack.server.heartbeats import Heartbeats
from gpustack.worker import api as agent_api
from tests.e2e.conftest import MakeNode
from tests.support.access import Row, Stage, compare, differences
from tests.support.node import Node
from tests.support.routes import concrete, walk

MODEL = "chat"


@pytest.fixture(scope="module")
def node(make_node: MakeNode) -> Node:
    return make_node("--force-auth-localhost").start()


@pytest.fixture(scope="module")
def local_node(make_node: MakeNode) -> Node:
    """A node where the loopback rule holds."""
    return make_node(name="local").start()


@pytest.fixture(scope="module")
def instance(node: Node, models: Path) -> int:
    (found,) = node.instances(node.deploy(MODEL, models / "chat.gguf"))
    return int(found["id"])


def server_app(tmp_path: Path) -> FastAPI:
    db = Database(f"sqlite:///{tmp_path / 'none.db'}")
    return create_app(db, Feed(db, "epoch", lambda *_: None), Heartbeats(), None, Known())


def server_routes(tmp_path: Path) -> list[tuple[str, str]]:
    app = server_app(tmp_path)
    # The document does not say that a parameter may hold slashes.
    found = [(method, path.replace(":path}", "}")) for method, path in walk(app.routes)]
    documented = {path for path, methods in app.openapi()["paths"].items() if methods}
    assert documented <= {path for _, path in found}  # the walk misses nothing
    return found


def secret(node: Node, name: str) -> str:
    return (node.data_dir / name).read_text().strip()


def agent_secret(node: Node) -> str:
    return str(json.loads(secret(node, "worker_credential"))["agent_secret"])


def instance_secret(node: Node, instance: int) -> str:
    for path in (node.data_dir / "engines").glob("*.json"):
        record = json.loads(path.read_text())
        if record["instance_id"] == instance:
            return Path(record["secret_file"]).read_text().strip()
    raise AssertionError(f"instance {instance} has no engine here")


def agent_port(node: Node) -> int:
    (pid,) = node.pids("agent")
    listening = [
        one.laddr.port
        for one in psutil.Process(pid).net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.laddr.port != node.worker_metrics_port
    ]
    assert len(listening) == 1
    return int(listening[0])


@asynccontextmanager
async def staged(node: Node, instance: int) -> AsyncIterator[Stage]:
    """Principals and objects on a real node; the agent's and an engine's secret are shown too."""
    # A worker's certificate is its own.
    async with httpx.AsyncClient(
        base_url=node.url,
        trust_env=False,
        timeout=30,
        verify=False,  # noqa: S501
    ) as http:
        secrets = {"agent": agent_secret(node), "instance": instance_secret(node, instance)}
        admin, gateway = secret(node, "local_admin"), secret(node, "gateway_credential")
        stage = Stage(http, admin=admin, gateway=gateway, join=secret(node, "token"), own=secrets)
        await stage.build()
        stage.ids |= {"id": MODEL, "any": "v1/chat/completions"}
        yield stage


def tables(node: Node, tmp_path: Path, thorough: bool) -> dict[str, tuple[int, list[Row]]]:
    """Place -> the port where its part of the table has to hold, and that part."""
    of_metrics = [("GET", metrics.PATH)]
    gateway = compare("gateway", _own(gateway_app.ROUTES))
    server = compare("server", walk(server_app(tmp_path).routes))
    answered = {row.route for row in gateway}
    passed_on = [row for row in server if row.route not in answered]
    strangers = [Row(row.route, {"nobody": row.answers["nobody"]}) for row in server]
    return {
        "through the gateway": (node.port, passed_on if thorough else strangers),
        "the server's own port": (node.api_port, strangers),
        "gateway": (node.port, gateway),
        "relay": (
            node.worker_port,
            compare("relay", {*_own(relay.ROUTES), *_own(agent_api.ROUTES)}),
        ),
        "agent": (agent_port(node), compare("agent", _own(agent_api.ROUTES))),
        "server's metrics": (node.metrics_port, compare("server-metrics", of_metrics)),
        "worker's metrics": (node.worker_metrics_port, compare("worker-metrics", of_metrics)),
    }


@pytest.mark.parametrize(
    "thorough",
    [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(600)])],
    ids=["few", "all"],
)
async def test_every_route_of_a_node_lets_in_whom_the_table_says(
    node: Node, instance: int, tmp_path: Path, thorough: bool
) -> None:
    wrong = []
    async with staged(node, instance) as stage:
        for place, (port, known) in tables(node, tmp_path, thorough).items():
            scheme = "https" if place == "relay" else "http"
            stage.http.base_url = httpx.URL(f"{scheme}://127.0.0.1:{port}")
            if place in {"relay", "agent"}:
                stage.ids["instance_id"] = instance
            found = await differences(stage, known, thorough=thorough)
            wrong += [f"{place}: {one}" for one in found]
    assert not wrong, "\n" + "\n".join(wrong)


def test_metrics_ports_serve_nothing_else(node: Node, tmp_path: Path) -> None:
    all_known = [*server_routes(tmp_path), *_own(gateway_app.ROUTES), *_own(agent_api.ROUTES)]
    known = [route for route in all_known if route != ("GET", metrics.PATH)]  # an agent's too
    with httpx.Client(trust_env=False) as http:
        for port in (node.metrics_port, node.worker_metrics_port):
            place = f"http://127.0.0.1:{port}"
            for method, pattern in known:
                method = method.replace("*", "POST")
                status = http.request(method, place + concrete(pattern)).status_code
                assert status == 404, (port, pattern)
            assert http.post(place + metrics.PATH).status_code == 405


def test_unknown_paths_tell_a_stranger_nothing(node: Node) -> None:
    for place in (node.url, f"https://127.0.0.1:{node.worker_port}"):
        for path in ("/", "/admin", "/v1/unknown", "/metrics", "/docs", "/debug/log_level"):
            answer = httpx.get(place + path, trust_env=False, timeout=10, verify=False)  # noqa: S501
            assert answer.status_code in {401, 404}, (place, path)


def test_a_route_that_is_added_is_on_the_list(tmp_path: Path) -> None:
    """The list is taken from the application: nobody has to remember it."""
    app = server_app(tmp_path)
    router = APIRouter(prefix="/v2/forgotten")

    @router.get("/door")
    async def door() -> str:
        return "open"

    app.include_router(router)
    assert ("GET", "/v2/forgotten/door") in set(walk(app.routes))


@pytest.mark.parametrize("path", ["/v1/models", "/v2/models", "/v2/users/me"])
def test_this_machine_needs_no_login_unless_something_foreign_stands_between(
    local_node: Node, path: str
) -> None:
    foreign = (
        {"Host": "gpustack.example"},
        {"Host": f"192.0.2.1:{local_node.port}"},
        {"X-Forwarded-For": "127.0.0.1"},
        {"Forwarded": "for=127.0.0.1"},
        {"X-Real-IP": "127.0.0.1"},
        {"Via": "1.1 proxy"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"X-GPUStack-Local": "1", "Origin": "http://evil.example"},
        {"Authorization": "Bearer wrong"},
    )
    with local_node.http(None) as http:
        assert http.get(path).status_code == 200
        assert http.get(path, headers={"Origin": local_node.url}).status_code == 200
        for headers in foreign:
            assert http.get(path, headers=headers).status_code == 401, headers


#: What comes to this machine's port from this machine, and is not its user: what it is -> version
#: of HTTP, and the head's lines. HERE stands for the address and port.
FOREIGN = {
    "a reverse proxy that says nothing but HTTP/1.0, as nginx does by default": (
        "1.0", ["Host: HERE", "Connection: close"],
    ),
    "a reverse proxy that passes the public name on": ("1.1", ["Host: gpustack.example"]),
    "a reverse proxy that names the client": ("1.1", ["Host: HERE", "X-Forwarded-For: 192.0.2.1"]),
    "a reverse proxy that names itself": ("1.1", ["Host: HERE", "Via: 1.1 proxy"]),
    "a client who says that it is this machine": (
        "1.1", ["Host: HERE", "X-Forwarded-For: 127.0.0.1", "X-Real-IP: 127.0.0.1"],
    ),
    "a client who says that a gateway says so": (
        "1.1",
        ["Host: gpustack.example", "X-GPUStack-Gateway: x", "X-GPUStack-Local: 1",
         "X-GPUStack-Peer: 127.0.0.1"],
    ),
    "a form or script on another site's page": (
        "1.1", ["Host: HERE", "Origin: http://evil.example", "Sec-Fetch-Site: cross-site"],
    ),
    "an image on another site's page": ("1.1", ["Host: HERE", "Sec-Fetch-Site: cross-site"]),
    "a page in a sandbox": ("1.1", ["Host: HERE", "Origin: null"]),
    "a page that another program here serves": (
        "1.1", ["Host: HERE", "Origin: http://127.0.0.1:3000", "Sec-Fetch-Site: same-site"],
    ),
    "a name that was rebound to this machine": (
        "1.1", ["Host: evil.example", "Origin: http://evil.example", "Sec-Fetch-Site: same-origin"],
    ),
    "a host that is two": ("1.1", ["Host: HERE", "Host: evil.example"]),
}  # fmt: skip
ASKED = (
    ("GET", "/v2/users/me"), ("GET", "/v1/models"), ("POST", "/v2/api-keys"),
    ("POST", "/v1/chat/completions"), ("DELETE", "/v2/api-keys/1"),
)  # fmt: skip


def asked(node: Node, method: str, target: str, version: str, lines: list[str]) -> int:
    """The status that the public port answers with to a head of exactly these lines."""
    here = f"127.0.0.1:{node.port}"
    body = b'{"name": "made by a stranger"}' if method == "POST" else b""
    head = [f"{method} {target} HTTP/{version}", *lines, f"Content-Length: {len(body)}"]
    raw = "\r\n".join([*head, "Content-Type: text/plain", "", ""]).replace("HERE", here)
    with socket.create_connection(("127.0.0.1", node.port), timeout=10) as connection:
        connection.sendall(raw.encode() + body)
        return int(connection.makefile("rb").readline().split()[1])


@pytest.mark.parametrize("who", FOREIGN)
def test_nothing_foreign_passes_for_this_machines_user_at_the_public_port(
    local_node: Node, who: str
) -> None:
    version, lines = FOREIGN[who]
    here = f"http://127.0.0.1:{local_node.port}"
    for method, path in ASKED:
        for target in (path, here + path):  # a proxy's clients say the whole address
            status = asked(local_node, method, target, version, lines)
            assert status in {400, 401, 403}, (method, target, status)
    with local_node.http() as http:
        assert http.get("/v2/api-keys").json()["items"] == []


def test_this_machines_user_is_let_in_by_such_a_head(local_node: Node) -> None:
    """Else the test above would show nothing."""
    assert asked(local_node, "GET", "/v2/users/me", "1.1", ["Host: HERE"]) == 200
    own_page = ["Host: HERE", "Origin: http://HERE", "Sec-Fetch-Site: same-origin"]
    assert asked(local_node, "GET", "/v1/models", "1.1", own_page) == 200
    # Let in, and told of the body: 422 of the server, 400 of the gateway.
    assert asked(local_node, "POST", "/v2/users", "1.1", own_page) == 422
    assert asked(local_node, "POST", "/v1/chat/completions", "1.1", own_page) == 400


def _own(listed: object) -> list[tuple[str, str]]:
    return [(route.method, route.pattern) for route in listed]  # type: ignore[attr-defined]
