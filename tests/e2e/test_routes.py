"""Every route of every application refuses strangers, unless it is on the public list."""

import re
from pathlib import Path

import httpx
import psutil
import pytest
from fastapi import APIRouter, FastAPI

from gpustack.forward import metrics
from gpustack.gateway import app as gateway_app
from gpustack.gateway import relay
from gpustack.schemas import wire
from gpustack.server.app import create_app
from gpustack.server.auth.known import Known
from gpustack.server.db.database import Database
from gpustack.server.feed import Feed
from gpustack.server.heartbeats import Heartbeats
from gpustack.worker import api as agent_api
from tests.e2e.conftest import MakeNode
from tests.support.node import Node
from tests.support.routes import OIDC, PUBLIC, SAML, walk


@pytest.fixture(scope="module")
def node(make_node: MakeNode) -> Node:
    return make_node("--force-auth-localhost").start()


@pytest.fixture(scope="module")
def local_node(make_node: MakeNode) -> Node:
    """A node where the loopback rule holds."""
    return make_node(name="local").start()


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


def concrete(pattern: str) -> str:
    """A path that the pattern matches."""
    return re.sub(r"\{[^}]*\}", "1", pattern).replace("*", "x")


def refused(method: str, url: str, secret: str | None = None) -> int:
    headers = {"Content-Type": "application/json"}
    if secret is not None:
        headers["Authorization"] = f"Bearer {secret}"
    if method == "*":  # any: what matters to the relay is the instance that is named
        method, headers = "POST", headers | {wire.INSTANCE_HEADER: "1"}
    answer = httpx.request(
        method, url, content=b"{}", headers=headers, trust_env=False, timeout=10,
        verify=False,  # noqa: S501  the worker's certificate is its own
    )  # fmt: skip
    return answer.status_code


def token_of(node: Node, shown: str) -> str | None:
    """What a machine shows that has a token to join with, at most."""
    if shown == "nothing":
        return None
    if shown == "the cluster's token":
        return (node.data_dir / "token").read_text().strip()
    with node.http() as http:
        made = http.post("/v2/join-tokens", json={"reusable": True})
    return str(made.json()["value"])


def agent_port(node: Node) -> int:
    (pid,) = node.pids("agent")
    listening = [
        one.laddr.port
        for one in psutil.Process(pid).net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.laddr.port != node.worker_metrics_port
    ]
    assert len(listening) == 1
    return int(listening[0])


@pytest.mark.parametrize("shown", ["nothing", "the cluster's token", "a join token"])
def test_no_route_of_any_application_answers_a_stranger(
    node: Node, tmp_path: Path, shown: str
) -> None:
    secret = token_of(node, shown)
    places = {
        f"http://127.0.0.1:{node.api_port}": server_routes(tmp_path),
        node.url: [*server_routes(tmp_path), *_own(gateway_app.ROUTES)],
        f"https://127.0.0.1:{node.worker_port}": [*_own(relay.ROUTES), *_own(agent_api.ROUTES)],
        f"http://127.0.0.1:{agent_port(node)}": _own(agent_api.ROUTES),
        f"http://127.0.0.1:{node.metrics_port}": [("GET", metrics.PATH)],
        f"http://127.0.0.1:{node.worker_metrics_port}": [("GET", metrics.PATH)],
    }
    checked, open_doors = 0, []
    for place, known in places.items():
        assert known
        for method, pattern in known:
            status = refused(method, place + concrete(pattern), secret)
            checked += 1
            if secret is not None and pattern == "/v2/workers/register":
                assert status == 422, (
                    place,
                    shown,
                )  # the one door that it opens: `{}` is no worker
                continue
            if pattern in OIDC | SAML:
                assert status == 404, (place, pattern)
            elif pattern in PUBLIC:
                assert status not in {401, 403, 404} or pattern == "/auth/login", (place, pattern)
            elif status not in {401, 403}:
                open_doors.append((place, method, pattern, status))
    assert open_doors == []
    assert checked > 60


def test_metrics_ports_serve_nothing_else(node: Node, tmp_path: Path) -> None:
    known = [*server_routes(tmp_path), *_own(gateway_app.ROUTES), *_own(agent_api.ROUTES)]
    with httpx.Client(trust_env=False) as http:
        for port in (node.metrics_port, node.worker_metrics_port):
            place = f"http://127.0.0.1:{port}"
            for method, pattern in known:
                status = http.request(method, place + concrete(pattern)).status_code
                assert status == 404, (port, pattern)
            assert http.post(place + metrics.PATH).status_code == 405


def test_unknown_paths_tell_a_stranger_nothing(node: Node) -> None:
    for place in (node.url, f"https://127.0.0.1:{node.worker_port}"):
        for path in ("/", "/admin", "/v1/unknown", "/metrics", "/docs", "/debug/log_level"):
            assert refused("GET", place + path) in {401, 404}, (place, path)


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


def _own(listed: object) -> list[tuple[str, str]]:
    return [(route.method, route.pattern) for route in listed]  # type: ignore[attr-defined]
