"""A node behind a trusted proxy: the client is who the proxy says, and nobody else is believed."""

import httpx
import pytest

from gpustack.server.auth.throttle import PAIR_FREE
from tests.e2e.conftest import MakeNode
from tests.support.node import Node

PASSWORD = "Behind-a-proxy-1"
FORM = {"username": "admin", "password": PASSWORD}
CLIENT = "203.0.113.9"


@pytest.fixture(scope="module")
def node(make_node: MakeNode) -> Node:
    return make_node("--trusted-proxies", "127.0.0.1", "--bootstrap-password", PASSWORD).start()


def passed_on(client: str, scheme: str = "https") -> dict[str, str]:
    return {"X-Forwarded-For": client, "X-Forwarded-Proto": scheme}


def login(http: httpx.Client, password: str, client: str, scheme: str = "https") -> httpx.Response:
    form = FORM | {"password": password}
    return http.post("/auth/login", data=form, headers=passed_on(client, scheme))


def test_a_session_by_way_of_https_never_travels_without(node: Node) -> None:
    with node.http(None) as http:
        assert "; Secure" in login(http, PASSWORD, CLIENT).headers["set-cookie"]
        assert "; Secure" not in login(http, PASSWORD, CLIENT, "http").headers["set-cookie"]


def test_the_audit_log_has_the_client(node: Node) -> None:
    with node.http() as http:
        made = http.post(
            "/v2/api-keys", json={"name": "k"}, headers=passed_on(f"1.1.1.1, {CLIENT}")
        )
        assert made.status_code == 201
        assert http.get("/v2/audit").json()["items"][-1]["peer"] == CLIENT


def test_logins_are_counted_by_client_whatever_it_sends(node: Node) -> None:
    with node.http(None) as http:
        tried = [
            login(http, "wrong", f"8.8.8.{n}, {CLIENT}").status_code for n in range(PAIR_FREE + 3)
        ]
        assert 429 in tried
        assert login(http, PASSWORD, "198.51.100.7").status_code == 204


def test_the_proxy_itself_is_not_this_machines_owner(node: Node) -> None:
    with node.http(None) as http:
        assert http.get("/v2/models").status_code == 401
        assert http.get("/v1/models").status_code == 401
    with node.http() as http:  # the command line has a credential
        assert http.get("/v2/models").status_code == 200


def test_what_the_gateway_passes_on_tells_browsers_what_it_is(node: Node) -> None:
    with node.http() as http:
        for path in ("/v2/models", "/docs"):
            headers = http.get(path).headers
            assert headers["x-frame-options"] == "DENY"
            assert headers.get_list("x-content-type-options") == ["nosniff"]
        assert http.get("/v1/models").headers["x-content-type-options"] == "nosniff"
