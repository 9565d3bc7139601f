"""An application's mistake ends its own request, with an answer, and no other."""

import asyncio

import pytest

from gpustack.forward.exchange import Ignored
from gpustack.forward.listener import Exchange, Receiver, Server
from gpustack.lib.platform import listen
from tests.support.raw_http import Client
from tests.support.wait import eventually


class Wrong(Ignored):
    """A receiver that raises where its request's path says."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.place = exchange.path[1:]
        self.left = asyncio.Event()

    def _reached(self, place: str) -> None:
        if place == self.place:
            raise ValueError("a mistake")

    def body(self, chunk: bytes) -> None:
        self._reached("body")

    def body_end(self) -> None:
        self._reached("body_end")
        if self.place == "started":
            self.exchange.start(200, [(b"content-length", b"10")])
            self.exchange.write(b"half")
            raise ValueError("a mistake")
        if self.place in ("pause", "resume"):
            self.exchange.start(200, [])
            for _ in range(100):
                self.exchange.write(b"x" * 100_000)
        elif self.place not in ("client_left", "end_now"):
            self.exchange.respond(200, body=b"ok")

    def client_left(self) -> None:
        self.left.set()
        self._reached("client_left")

    def pause(self) -> None:
        self._reached("pause")

    def resume(self) -> None:
        self._reached("resume")

    def end_now(self) -> None:
        self._reached("end_now")


class Served:
    """A server of `Wrong`, and the receivers that it made."""

    def __init__(self) -> None:
        self.made: list[Wrong] = []
        self.server = Server(self._app, sweep_s=0.02)
        self.port = 0

    def _app(self, exchange: Exchange) -> Receiver:
        if exchange.path == "/app":
            raise RuntimeError("a mistake")
        self.made.append(Wrong(exchange))
        return self.made[-1]

    async def listen(self) -> None:
        sock = listen("127.0.0.1", 0)
        self.port = sock.getsockname()[1]
        await self.server.listen(sock)

    async def works(self) -> bool:
        client = await Client.to(self.port)
        client.ask("GET", "/fine")
        return (await client.reply()).body == b"ok"


@pytest.mark.parametrize("place", ["app", "body", "body_end"])
async def test_a_mistake_before_the_answer_is_a_500_and_the_connection_lives_on(
    place: str, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served()
    await served.listen()
    client = await Client.to(served.port)
    client.ask("POST", f"/{place}", body=b"some")
    reply = await client.reply()
    assert (reply.status, b"internal_error" in reply.body) == (500, True)
    assert b"mistake" not in reply.body
    assert "a mistake" in caplog.text
    assert all(wrong.left.is_set() for wrong in served.made)
    client.ask("GET", "/fine")
    assert (await client.reply()).body == b"ok"
    served.server.close()


@pytest.mark.parametrize("place", ["started", "pause", "resume"])
async def test_a_mistake_in_an_answer_breaks_it_off(place: str) -> None:
    served = Served()
    await served.listen()
    client = await Client.to(served.port)
    client.ask("POST", f"/{place}", body=b"some")
    reply = await client.reply()
    assert (reply.status, reply.whole) == (200, False)
    assert served.made[0].left.is_set()
    assert await served.works()
    served.server.close()


async def test_a_mistake_when_the_client_leaves_or_a_drain_begins_harms_nobody() -> None:
    served = Served()
    await served.listen()
    leaving, watching = await Client.to(served.port), await Client.to(served.port)
    leaving.ask("GET", "/client_left")
    watching.ask("GET", "/end_now")

    async def both() -> bool:
        return len(served.made) == 2

    await eventually(both, "both requests")
    leaving.abort()
    (left,) = [wrong for wrong in served.made if wrong.place == "client_left"]
    async with asyncio.timeout(5):
        await left.left.wait()
    assert await served.works()
    (endless,) = [wrong for wrong in served.made if wrong.place == "end_now"]
    endless.exchange.endless = True
    async with asyncio.timeout(5):
        await served.server.drain(idle_s=0.0, limit_s=4.0)
    assert (await watching.reply()).status == 500
