"""Whom the gateway lets use which models."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from gpustack.gateway.credentials import may_use
from gpustack.gateway.tables import Credential, Tables
from gpustack.schemas import wire
from tests.support.data_plane import KEY, Gateway, fill, gateway
from tests.support.openai_engine import Seen, Wire, running
from tests.support.raw_http import Reply, ask
from tests.support.wait import eventually
from tests.support.watch_server import Object, credential, instance, model, watch_server

CHAT = "/v1/chat/completions"
USER, GROUP = 5, 7


def granted(*users: int, groups: tuple[int, ...] = ()) -> Object:
    return {"granted_to": {"user_ids": [*users], "group_ids": [*groups]}}


def auth(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def body(name: str) -> bytes:
    return json.dumps({"model": name}).encode()


async def answer_to(
    gate: Gateway, method: str, path: str, headers: dict[str, str], content: bytes = b""
) -> Reply:
    """The gateway's answer; a busy machine may be too slow for the news that it waits for."""
    while (reply := await ask(gate.port, method, path, headers, content)).status == 503:
        pass
    return reply


@pytest.mark.parametrize(
    ("who", "granted_to", "may"),
    [
        ({}, None, True),
        ({}, granted(), False),
        ({}, granted(USER + 1, groups=(GROUP,)), False),
        ({}, granted(USER), True),
        ({"group_ids": [GROUP]}, granted(), False),
        ({"group_ids": [GROUP, 9]}, granted(1, groups=(8, 9)), True),
        ({"group_ids": [GROUP, 9]}, granted(1, groups=(8, 10)), False),
        ({"is_admin": True}, granted(), True),
        ({"user_id": None}, granted(USER), False),
    ],
)
def test_a_model_is_for_every_user_or_for_those_whom_it_is_granted_to(
    who: Object, granted_to: Object | None, may: bool
) -> None:
    tables = Tables()
    shown = credential(1, "x", **{"user_id": USER} | who)
    tables.put(wire.CREDENTIALS, json.dumps(shown).encode())
    tables.put(wire.MODELS, json.dumps(model(1, "m", **granted_to or {})).encode())
    for one in (tables, Tables.load(tables.dump())):
        assert may_use(one.credentials[1], one.models[1]) is may
        assert may_use(None, one.models[1])  # this machine acts as an administrator


def test_what_says_nothing_of_who_may_is_nobodys() -> None:
    """A server of another release might not say: better no model than everybody's."""
    tables = Tables()
    silent = {k: v for k, v in model(1, "m").items() if k != "granted_to"}
    with pytest.raises(ValueError, match="granted_to"):
        tables.put(wire.MODELS, json.dumps(silent).encode())
    bare = Credential(id=1, kind="key", digest="x", scopes=("*",), user_id=USER)
    tables.put(wire.MODELS, json.dumps(model(1, "m", **granted())).encode())
    assert not may_use(bare, tables.models[1])


async def test_a_model_that_is_not_granted_is_one_that_is_not_there(tmp_path: Path) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)  # m, every user's
        for id, (name, more) in enumerate(
            {"hers": granted(USER), "groups": granted(groups=(GROUP,)), "none": granted()}.items(),
            2,
        ):
            server.put("models", model(id, name, **more))
            server.put("model-instances", instance(id, id, engine.port))
        who: dict[str, dict[str, Any]] = {
            "ann": {"user_id": USER},
            "bob": {"user_id": USER + 1, "group_ids": [GROUP]},
            "key": {"user_id": USER, "allowed_model_names": ["m", "none"]},
            "root": {"user_id": 1, "is_admin": True},
        }
        for id, (secret, more) in enumerate(who.items(), 2):
            server.put("credentials", credential(id, secret, **more))
        sees = {
            "ann": ["m", "hers"],
            "bob": ["m", "groups"],
            "key": ["m"],
            "root": ["m", "hers", "groups", "none"],
        }
        async with gateway(tmp_path, server.port, force_auth=False) as gate:
            for secret, names in sees.items():
                listed = await answer_to(gate, "GET", "/v1/models", auth(secret))
                assert [one["id"] for one in json.loads(listed.body)["data"]] == names, secret
                for name in ("m", "hers", "groups", "none"):
                    status = 200 if name in names else 404
                    if secret == "key" and name in ("hers", "groups"):
                        status = 403  # the key's own limit, whatever there is
                    shown = await answer_to(gate, "GET", f"/v1/models/{name}", auth(secret))
                    ran = await answer_to(gate, "POST", CHAT, auth(secret), body(name))
                    assert (shown.status, ran.status) == (status, status), (secret, name)
            for path in (CHAT, "/v1/embeddings", "/v1-openai/completions", "/v2/rerank"):
                told = [
                    (await answer_to(gate, "POST", path, auth("ann"), body(name)))
                    for name in ("none", "made")
                ]
                assert [one.status for one in told] == [404, 404]
                assert told[0].body.replace(b"none", b"made") == told[1].body
            assert json.loads(told[0].body)["error"]["code"] == "model_not_found"
            here = await answer_to(gate, "POST", CHAT, {}, body("none"))
            assert here.status == 200  # the loopback rule


async def test_what_was_granted_just_now_is_used_at_once(tmp_path: Path) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        server.put("models", model(1, "m", **granted(groups=(GROUP,))))
        server.put("credentials", credential(2, "ann", user_id=USER))
        async with gateway(tmp_path, server.port) as gate:
            assert (await answer_to(gate, "POST", CHAT, auth("ann"), body("m"))).status == 404
            server.announces = False
            server.put("credentials", credential(2, "ann", user_id=USER, group_ids=[GROUP]))
            assert (await answer_to(gate, "POST", CHAT, auth("ann"), body("m"))).status == 200


async def test_what_is_granted_no_more_is_refused_and_open_streams_finish(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def answer(seen: Seen, wire: Wire) -> None:
        if not json.loads(seen.body).get("stream"):
            await wire.json({})
            return
        await wire.stream_head()
        await wire.chunk(b"data: {}\n\n")
        await go_on.wait()
        await wire.chunk(b"data: [DONE]\n\n")
        await wire.end()

    async with watch_server() as server, running(answer) as engine:
        fill(server, engine)
        server.put("models", model(1, "m", **granted(1)))
        async with gateway(tmp_path, server.port) as gate:
            stream = asyncio.ensure_future(gate.chat({"model": "m", "stream": True}))

            async def begun() -> bool:
                return bool(engine.seen)

            await eventually(begun, "the stream is at the engine")
            server.put("models", model(1, "m", **granted()))

            async def refused() -> bool:
                return (await answer_to(gate, "POST", CHAT, auth(KEY), body("m"))).status == 404

            await eventually(refused, "the model is refused")
            go_on.set()
            reply = await stream
            assert (reply.status, reply.body.endswith(b"[DONE]\n\n")) == (200, True)
