"""What becomes of open requests whose credential is withdrawn: `--revoked-streams`."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpustack.config.load import load
from gpustack.gateway.app import data_plane
from gpustack.gateway.counts import Counts
from gpustack.gateway.inference import open_requests
from gpustack.gateway.public import Public
from gpustack.lib.platform import listen
from tests.support.data_plane import AUTH, KEY, fill
from tests.support.openai_engine import Engine, Seen, Wire, content_events, running
from tests.support.raw_http import Client, Reply, ask
from tests.support.wait import eventually
from tests.support.watch_server import WatchServer, credential, model, watch_server

OTHER = "another-key"
WITHDRAWN: dict[str, Callable[[WatchServer], None]] = {
    "revoked": lambda server: server.delete("credentials", 1),
    "its user is disabled": lambda server: server.put(
        "credentials", credential(1, KEY, user_disabled=True)
    ),
    "for other models": lambda server: server.put(
        "credentials", credential(1, KEY, allowed_model_names=["other"])
    ),
    "the model is granted to others": lambda server: server.put(
        "models", model(1, "m", granted_to={"user_ids": [2], "group_ids": []})
    ),
    "of another scope": lambda server: server.put(
        "credentials", credential(1, KEY) | {"scopes": ["management"]}
    ),
}


@dataclass
class Served:
    port: int
    public: Public
    server: WatchServer
    engine: Engine
    go_on: asyncio.Event

    async def stream(self, secret: str) -> Client:
        """A stream that has begun, and goes on at `go_on`."""
        client = await Client.to(self.port)
        body = json.dumps({"model": "m", "stream": True}).encode()
        shown = {"Authorization": f"Bearer {secret}"}
        client.ask("POST", "/v1/chat/completions", shown, body)
        assert (await client.head()).status == 200
        assert await client.chunk()
        return client


@asynccontextmanager
async def served(folder: Path, ends: str) -> AsyncIterator[Served]:
    go_on = asyncio.Event()

    async def answer(seen: Seen, wire: Wire) -> None:
        await wire.stream_head()
        await wire.chunk(content_events(1)[0])
        await go_on.wait()
        await wire.end()

    settings = load({"data_dir": str(folder), "revoked_streams": ends}, {}).settings
    async with watch_server() as server, running(answer) as engine:
        fill(server, engine)
        server.put("credentials", credential(2, OTHER, user_id=2))
        place = ("127.0.0.1", server.port)
        (folder / "worker_credential").write_text('{"worker_id": 1, "credential": "x"}')
        async with data_plane(
            settings, server=place, credential="gateway-secret", counts=Counts.private()
        ) as public:
            sock = listen("127.0.0.1", 0)
            await public.listener.listen(sock)
            port = sock.getsockname()[1]

            async def ready() -> bool:
                return (await ask(port, "GET", "/readyz")).status == 200

            try:
                await eventually(ready, "the gateway has its tables")
                yield Served(port, public, server, engine, go_on)
            finally:
                public.listener.close()
                go_on.set()


async def is_cut(client: Client) -> bool:
    """Whether the stream broke off; it may also have come to its end."""
    try:
        async with asyncio.timeout(10):
            return await client.chunk() != b""
    except (asyncio.IncompleteReadError, ConnectionError):
        return True


@pytest.mark.parametrize("how", WITHDRAWN)
async def test_an_open_stream_ends_with_its_credential_and_others_go_on(
    tmp_path: Path, how: str
) -> None:
    async with served(tmp_path, "end") as there:
        mine, others = await there.stream(KEY), await there.stream(OTHER)
        WITHDRAWN[how](there.server)
        assert await is_cut(mine)
        async with asyncio.timeout(5):
            await there.engine.left.wait()  # nothing goes on for nobody
        there.go_on.set()
        assert not await is_cut(others)


async def test_a_request_that_is_not_answered_yet_is_refused(tmp_path: Path) -> None:
    async with served(tmp_path, "end") as there:

        async def think(seen: Seen, wire: Wire) -> None:
            await there.go_on.wait()

        there.engine.answer = think
        client = await Client.to(there.port)
        client.ask("POST", "/v1/chat/completions", AUTH, b'{"model": "m"}')

        async def arrived() -> bool:
            return bool(there.engine.seen)

        await eventually(arrived, "the request at the engine")
        WITHDRAWN["revoked"](there.server)
        reply: Reply = await client.reply()
        assert (reply.status, b"revoked" in reply.body) == (401, True)


async def test_it_finishes_unless_the_operator_says_otherwise(tmp_path: Path) -> None:
    async with served(tmp_path, "finish") as there:
        stream = await there.stream(KEY)
        WITHDRAWN["its user is disabled"](there.server)

        async def refused() -> bool:
            return (await ask(there.port, "GET", "/v1/models", AUTH)).status == 401

        await eventually(refused, "the key opens nothing any more")
        await asyncio.sleep(0.5)  # whoever ended it would have by now
        there.go_on.set()
        assert not await is_cut(stream)


async def test_a_running_node_takes_the_operators_word(tmp_path: Path) -> None:
    async with served(tmp_path, "finish") as there:
        stream = await there.stream(KEY)
        there.public.reload({"revoked_streams": "end"})
        WITHDRAWN["revoked"](there.server)
        assert await is_cut(stream)


@pytest.mark.parametrize("how", WITHDRAWN)
async def test_a_body_that_takes_its_time_begins_nothing_after_it(tmp_path: Path, how: str) -> None:
    async with served(tmp_path, "finish") as there:
        body = b'{"model": "m"}'
        client = await Client.to(there.port)
        sized = AUTH | {"Content-Length": str(len(body))}
        client.ask("POST", "/v1/chat/completions", sized, body[:5])

        async def arrived() -> bool:
            return any(open_requests(there.public.listener))

        await eventually(arrived, "the head of the request")
        WITHDRAWN[how](there.server)

        async def refused() -> bool:
            return (await ask(there.port, "GET", "/v1/models/m", AUTH)).status >= 400

        await eventually(refused, "new requests are refused")
        client.send(body[5:])
        assert (await client.reply()).status in {401, 403, 404}
        assert not there.engine.seen
