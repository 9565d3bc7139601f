"""Pages of other origins: what browsers are told, and that it opens nothing."""

from pathlib import Path

import pytest

from gpustack.config.load import load
from gpustack.gateway.cors import Policy
from tests.support.data_plane import AUTH, KEY, fill, gateway
from tests.support.openai_engine import Wire, running, streaming
from tests.support.raw_http import Reply, ask, raw
from tests.support.watch_server import watch_server

PAGE = "https://app.example"
CHAT = "/v1/chat/completions"
BODY = b'{"model": "m"}'
SESSION = {"Cookie": f"gpustack_session={KEY}"}


def policy(**options: object) -> Policy | None:
    return Policy.of(load({"enable_cors": True, **options}, {}).settings)


NAMED = {"allow_origins": [PAGE]}


def told(reply: Reply) -> dict[str, str]:
    return {
        name.removeprefix("access-control-"): value
        for name, value in reply.headers.items()
        if name.startswith("access-control-") or name == "vary"
    }


def preflight(origin: str = PAGE, method: str = "POST") -> dict[str, str]:
    return {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization, x-extra",
    }


async def test_without_the_option_nothing_is_told(tmp_path: Path) -> None:
    assert Policy.of(load({}, {}).settings) is None
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            reply = await gate.chat(BODY, {"Origin": PAGE})
            assert (reply.status, told(reply)) == (200, {})
            asked = await ask(gate.port, "OPTIONS", CHAT, preflight())
            assert (asked.status, told(asked)) == (401, {})


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({}, {"allow-origin": "*"}),
        (NAMED, {"allow-origin": PAGE, "vary": "Origin"}),
        (
            NAMED | {"allow_credentials": True},
            {"allow-origin": PAGE, "vary": "Origin", "allow-credentials": "true"},
        ),
        ({"allow_origins": ["https://other.example"]}, {"vary": "Origin"}),
    ],
)
async def test_every_answer_says_who_may_read_it(
    tmp_path: Path, options: dict[str, object], answer: dict[str, str]
) -> None:
    page = {"Origin": PAGE}
    async with watch_server() as server, running(streaming(2)) as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port, cors=policy(**options)) as gate:
            for reply, status in (
                (await gate.chat(b'{"model": "m", "stream": true}', page), 200),
                (await gate.chat(b"nonsense", page), 400),
                (await ask(gate.port, "POST", CHAT, page, BODY), 401),
                (await ask(gate.port, "GET", "/v1/models", AUTH | page), 200),
                (await ask(gate.port, "GET", "/v2/models", AUTH | page), 200),
                (await ask(gate.port, "GET", "/readyz", page), 200),
            ):
                assert (reply.status, told(reply)) == (status, answer)
            same_site = await ask(gate.port, "GET", "/readyz")
            assert told(same_site) == {key: answer[key] for key in answer if key == "vary"}


async def test_an_engines_own_word_on_origins_is_not_passed_on(tmp_path: Path) -> None:
    async def answer(_: object, wire: Wire) -> None:
        head = b"HTTP/1.1 200 OK\r\naccess-control-allow-origin: https://evil.example\r\n"
        await wire.raw(head + b"content-length: 2\r\n\r\n{}")

    async with watch_server() as server, running(answer) as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port, cors=policy(**NAMED)) as gate:
            assert told(await gate.chat(BODY, {"Origin": "https://evil.example"})) == {
                "vary": "Origin"
            }


async def test_a_preflight_is_answered_for_every_path_and_runs_nothing(tmp_path: Path) -> None:
    options = NAMED | {"allow_methods": ["get", "PUT"], "allow_headers": ["Authorization"]}
    async with watch_server() as server:
        async with gateway(tmp_path, server.port, cors=policy(**options)) as gate:
            for path in (CHAT, "/v2/models", "/auth/login", "/made-up"):
                reply = await ask(gate.port, "OPTIONS", path, preflight())
                assert reply.status == 204
                assert told(reply) == {
                    "allow-origin": PAGE,
                    "vary": "Origin",
                    "allow-methods": "GET, PUT",
                    "allow-headers": "Authorization",
                    "max-age": "600",
                }
            stranger = await ask(gate.port, "OPTIONS", CHAT, preflight("https://evil.example"))
            assert (stranger.status, told(stranger)) == (403, {"vary": "Origin"})
            assert b"--allow-origins" in stranger.body
            plain = await ask(gate.port, "OPTIONS", "/v2/models", AUTH | {"Origin": PAGE})
            assert plain.status == 200
        assert [seen.method for seen in server.passed] == ["OPTIONS"]


async def test_stars_allow_what_is_asked_for(tmp_path: Path) -> None:
    wild = policy(allow_methods=["*"], allow_headers=["*"])
    async with watch_server() as server, gateway(tmp_path, server.port, cors=wild) as gate:
        reply = await ask(gate.port, "OPTIONS", CHAT, preflight(method="PATCH"))
        assert told(reply) == {
            "allow-origin": "*",
            "allow-methods": "PATCH",
            "allow-headers": "authorization, x-extra",
            "max-age": "600",
        }


@pytest.mark.parametrize(
    ("options", "status"),
    [(NAMED, 403), ({}, 403), (NAMED | {"allow_credentials": True}, 200)],
)
async def test_a_session_acts_for_pages_of_named_origins_alone(
    tmp_path: Path, options: dict[str, object], status: int
) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port, cors=policy(**options)) as gate:
            page = SESSION | {"Origin": PAGE}
            assert (await ask(gate.port, "POST", CHAT, page, BODY)).status == status
            evil = SESSION | {"Origin": "https://evil.example"}
            assert (await ask(gate.port, "POST", CHAT, evil, BODY)).status == 403
            forged = page | {"X-GPUStack-Vouched": "1"}
            await ask(gate.port, "POST", "/v2/models", forged)
            sent = server.passed[-1].raw_head.lower().count(b"x-gpustack-vouched")
            assert sent == (1 if status == 200 else 0)


async def test_two_origins_are_none_that_is_answered(tmp_path: Path) -> None:
    generous = policy(allow_origins=[PAGE], allow_credentials=True)
    twice = f"Origin: {PAGE}\r\nOrigin: https://evil.example\r\n"
    async with watch_server() as server, gateway(tmp_path, server.port, cors=generous) as gate:
        head = f"GET /readyz HTTP/1.1\r\nHost: h\r\n{twice}Connection: close\r\n\r\n"
        answer = await raw(gate.port, head.encode())
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"access-control" not in answer.lower()


async def test_no_page_of_another_origin_passes_for_somebody_on_this_machine(
    tmp_path: Path,
) -> None:
    generous = policy(allow_origins=[PAGE], allow_credentials=True)
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port, force_auth=False, cors=generous) as gate:
            assert (await ask(gate.port, "POST", CHAT, {}, BODY)).status == 200
            assert (await ask(gate.port, "POST", CHAT, {"Origin": PAGE}, BODY)).status == 401
            await ask(gate.port, "GET", "/v2/models", {"Origin": PAGE})
            assert b"x-gpustack-local" not in server.passed[-1].raw_head.lower()
