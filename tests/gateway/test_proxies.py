"""Whose word of a client's address and scheme is believed."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpustack.forward.address import FORWARDING
from gpustack.forward.http1 import Headers
from gpustack.gateway.proxies import Proxies, scheme
from tests.support.data_plane import AUTH, fill, gateway
from tests.support.openai_engine import running
from tests.support.raw_http import ask
from tests.support.watch_server import watch_server

CLIENT = "203.0.113.9"
CHAT = "/v1/chat/completions"
BODY = b'{"model": "m"}'
TRUSTED = Proxies(["10.0.0.0/8", "192.0.2.7/32", "2001:db8:1::/48", "::1/128"])


def forwarded(*values: str) -> Headers:
    return [(b"host", b"a"), *((b"x-forwarded-for", value.encode("latin-1")) for value in values)]


@pytest.mark.parametrize(
    ("peer", "trusted"),
    [
        ("10.1.2.3", True), ("::ffff:10.1.2.3", True), ("192.0.2.7", True), ("192.0.2.8", False),
        ("2001:db8:1::5", True), ("2001:db8:2::5", False), ("::1", True), ("127.0.0.1", False),
        ("", False), ("localhost", False), ("11.0.0.1", False),
    ],
)  # fmt: skip
def test_a_proxy_is_trusted_by_its_address_or_network(peer: str, trusted: bool) -> None:
    assert TRUSTED.trusts(peer) is trusted


@pytest.mark.parametrize(
    ("said", "client"),
    [
        ((CLIENT,), CLIENT),
        # What the client sent stands on the left, whatever it says.
        ((f"127.0.0.1, {CLIENT}",), CLIENT),
        ((f"10.0.0.5, {CLIENT}",), CLIENT),
        ((f"1.1.1.1, {CLIENT}, 10.0.0.2, 192.0.2.7",), CLIENT),
        (("1.1.1.1", CLIENT), CLIENT),  # two headers are one list
        ((CLIENT, "10.0.0.2"), CLIENT),
        ((f"{CLIENT}:4711",), CLIENT),
        (("2001:db8:9::1",), "2001:db8:9::1"),
        (("[2001:db8:9::1]:443",), "2001:db8:9::1"),
        (("2001:DB8:9:0::1, 2001:db8:1::9",), "2001:db8:9::1"),
        ((f"::ffff:{CLIENT}",), CLIENT),
        (("10.0.0.8, 10.0.0.9",), "10.0.0.8"),  # a client within the trusted network
        ((), "10.0.0.1"),
    ],
)
def test_the_client_is_the_first_from_the_right_that_is_no_trusted_proxy(
    said: tuple[str, ...], client: str
) -> None:
    assert TRUSTED.client("10.0.0.1", forwarded(*said)) == client


@pytest.mark.parametrize(
    "garbage",
    ["", ",", "unknown", "_hidden", "localhost", "1.2.3", "1.2.3.4.5", "[::1", "evil\xff",
     "1.2.3.4 x", "for=1.2.3.4", "0x7f000001", "2130706433", "127.0.0.1;", "1.2.3.4:port"],
)  # fmt: skip
def test_what_is_no_address_is_the_word_of_the_proxy_that_wrote_it(garbage: str) -> None:
    assert TRUSTED.client("10.0.0.1", forwarded(f"{CLIENT}, {garbage}")) == "10.0.0.1"
    assert TRUSTED.client("10.0.0.1", forwarded(f"{CLIENT}, {garbage}, 10.0.0.3")) == "10.0.0.3"


@given(st.text(st.characters(max_codepoint=255), max_size=40))
def test_nothing_that_a_client_sends_hides_its_address(made_up: str) -> None:
    assert TRUSTED.client("10.0.0.1", forwarded(made_up, CLIENT)) == CLIENT
    assert TRUSTED.client("10.0.0.1", forwarded(f"{made_up},{CLIENT}")) == CLIENT


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ((), None), ((b"https",), b"https"), ((b"HTTPS",), b"https"), ((b"http",), b"http"),
        ((b"https, http",), b"http"), ((b"https", b"http"), b"http"), ((b"wss",), None),
        ((b"",), None), ((b"https,",), None), ((b"https; x",), None),
    ],
)  # fmt: skip
def test_the_scheme_is_the_nearest_proxys_word(
    said: tuple[bytes, ...], found: bytes | None
) -> None:
    assert scheme([(b"x-forwarded-proto", value) for value in said]) == found


FORGED = {
    "X-Forwarded-For": CLIENT,
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "evil.example",
    "Forwarded": f"for={CLIENT};proto=https",
    "X-Real-IP": CLIENT,
}


@pytest.mark.parametrize("trusted", [[], ["10.0.0.0/8", "::1/128"]])
async def test_from_anybody_else_forwarding_headers_are_ignored_and_stripped(
    tmp_path: Path, trusted: list[str]
) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(
            tmp_path, server.port, force_auth=False, trusted_proxies=trusted
        ) as gate:
            await ask(gate.port, "GET", "/v2/models", FORGED)
            seen = server.passed[0].headers
            assert (seen["x-gpustack-peer"], seen["x-gpustack-scheme"]) == ("127.0.0.1", "http")
            assert not [name for name in seen if name in {n.lower() for n in FORGED}]
            # They are a sign all the same that somebody stands between.
            assert "x-gpustack-local" not in seen
            assert (await ask(gate.port, "POST", CHAT, FORGED, BODY)).status == 401
            assert (await ask(gate.port, "POST", CHAT, FORGED | AUTH, BODY)).status == 200
            assert not [name for name in engine.seen[-1].headers if "forward" in name]


async def test_a_trusted_proxys_word_is_the_peer_and_the_scheme(tmp_path: Path) -> None:
    async with watch_server() as server:
        async with gateway(
            tmp_path, server.port, force_auth=False, trusted_proxies=["127.0.0.0/8"]
        ) as gate:
            spoofed = FORGED | {"X-Forwarded-For": f"127.0.0.1, 8.8.8.8, {CLIENT}"}
            await ask(gate.port, "GET", "/v2/models", spoofed | {"X-GPUStack-Peer": "8.8.8.8"})
            seen = server.passed[0].headers
            assert (seen["x-gpustack-peer"], seen["x-gpustack-scheme"]) == (CLIENT, "https")
            assert not [name for name in seen if name in {n.lower() for n in FORGED}]


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"X-Forwarded-For": "127.0.0.1"}, {"X-Forwarded-For": "::1"}, {"X-Forwarded-For": "x"},
        {"Connection": "X-Forwarded-For", "X-Forwarded-For": "127.0.0.1"},
        *({name.decode(): "127.0.0.1"} for name in sorted(FORWARDING)),
    ],
)  # fmt: skip
async def test_what_a_trusted_proxy_passes_on_is_never_this_machines_own(
    tmp_path: Path, headers: dict[str, str]
) -> None:
    """Not even without a header: a proxy on this machine may tell of nobody."""
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(
            tmp_path, server.port, force_auth=False, trusted_proxies=["127.0.0.1/32"]
        ) as gate:
            await ask(gate.port, "GET", "/v2/models", headers)
            assert "x-gpustack-local" not in server.passed[0].headers
            answer = await ask(gate.port, "POST", CHAT, headers, BODY)
            assert (answer.status, json.loads(answer.body)["error"]["code"]) == (
                401,
                "invalid_api_key",
            )
