"""What a tunnel adds to a request that goes from a gateway to a relay: processor time, both ends.

    python -m benchmarks.tunnels [--requests 2000] [--rounds 5]

The gateway's pool, the relay and an engine that answers at once run in this process. The way from
pool to relay is TLS: to the relay's port, or through a tunnel, turn by turn, so that what else runs
here hits both.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import uvloop

from gpustack.forward.connection import Connection
from gpustack.forward.exchange import IGNORED, Exchange, Receiver
from gpustack.forward.http1 import Headers
from gpustack.forward.listener import Server
from gpustack.forward.tunnel import Tunnel
from gpustack.forward.upstream import Address, Door, Failure, Pool
from gpustack.gateway.relay import Engines, Relay
from gpustack.gateway.tls import Certificate
from gpustack.lib import trust
from gpustack.lib.platform import listen, write_private
from gpustack.schemas.wire import INSTANCE_HEADER, WORKER_CERTIFICATE_FILE
from gpustack.worker.certificate import OwnCertificate

THROUGH: Final[Address] = ("tunnel", 0)
SECRET: Final = "an-instances-secret"  # noqa: S105
PIECES: Final = 200
PIECE: Final = b'data: {"choices":[{"delta":{"content":" token"}}]}\n\n'


class Engine:
    """Answers at once; /stream in PIECES pieces, one for each turn of the loop."""

    def __call__(self, exchange: Exchange) -> Receiver:
        if exchange.path != "/stream":
            exchange.respond(200, [], b"x" * 500)
            return IGNORED
        exchange.start(200, [(b"content-type", b"text/event-stream")])
        self._next(exchange, PIECES)
        return IGNORED

    def _next(self, exchange: Exchange, left: int) -> None:
        if not left:
            exchange.finish()
            return
        exchange.write(PIECE)
        asyncio.get_running_loop().call_later(0.001, self._next, exchange, left - 1)


class Answer:
    """A sink that knows when the answer is whole."""

    def __init__(self) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def head(self, status: int, headers: Headers) -> None:
        if status != 200:
            self.done.set_exception(RuntimeError(f"status {status}"))

    def piece(self, piece: bytes) -> None: ...
    def pause_body(self) -> None: ...
    def resume_body(self) -> None: ...

    def end(self, last: bytes) -> None:
        self.done.set_result(None)

    def failed(self, failure: Failure) -> None:
        self.done.set_exception(RuntimeError(failure.value))


async def measured(requests: int, rounds: int) -> None:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        group = await stack.enter_async_context(asyncio.TaskGroup())
        pem = OwnCertificate(folder, "w").pem
        file = folder / WORKER_CERTIFICATE_FILE
        tls = Certificate(file, file).context
        engine, loop = Server(Engine()), asyncio.get_running_loop()
        sock = listen("127.0.0.1", 0)
        key, record = folder / "u.key", '{"instance_id":1,"port":%d,"secret_file":"%s"}'
        write_private(key, SECRET)
        write_private(folder / "u.json", record % (sock.getsockname()[1], key))
        await engine.listen(sock)
        relay_pool = Pool(group)
        relay = Server(Relay(relay_pool, Engines(folder), ("127.0.0.1", 1)))
        sock = listen("127.0.0.1", 0)
        direct: Address = ("127.0.0.1", sock.getsockname()[1])
        await relay.listen(sock, tls=tls)
        arrived: asyncio.Future[Tunnel] = loop.create_future()

        def arrive() -> Tunnel:
            arrived.set_result(Tunnel())
            return arrived.result()

        public = await loop.create_server(arrive, "127.0.0.1", 0, ssl=tls)
        its = Tunnel(accept=lambda: Connection(relay, b"https"))
        at = public.sockets[0].getsockname()
        await loop.create_connection(lambda: its, *at, ssl=trust.exactly(pem))
        tunnel = await arrived

        async def enter(protocol: asyncio.Protocol) -> None:
            tunnel.open(protocol)

        def door(address: Address) -> Door | None:
            return enter if address == THROUGH else None

        pool = Pool(group, doors=door)
        ways: dict[str, tuple[Address, str]] = {"direct": (direct, pem), "tunnel": (THROUGH, "")}

        async def ask(path: bytes, way: str) -> None:
            address, certificate = ways[way]
            headers = [
                (b"host", b"x"),
                (b"authorization", b"Bearer " + SECRET.encode()),
                (INSTANCE_HEADER.encode(), b"1"),
            ]
            answer = Answer()
            pool.send(
                address, "POST", path, headers, answer, repeatable=True, body=b"y" * 1000,
                certificate=certificate,
            )  # fmt: skip
            await answer.done

        async def one_by_one(way: str) -> None:
            for _ in range(requests):
                await ask(b"/", way)

        async def streams(way: str) -> None:
            await asyncio.gather(*(ask(b"/stream", way) for _ in range(64)))

        for what, run, count in (
            ("a request, one after the other", one_by_one, requests),
            (f"a piece of 64 streams of {PIECES}", streams, 64 * PIECES),
        ):
            print(what, await compared(run, count, rounds))
        public.close()
        for each in (relay, engine):
            each.close()
        for each_pool in (pool, relay_pool):
            each_pool.close()
        tunnel.abort()


async def compared(run: Callable[[str], Awaitable[None]], count: int, rounds: int) -> str:
    spent: dict[str, list[float]] = {"direct": [], "tunnel": []}
    for number in range(rounds + 1):
        for way, found in spent.items():
            began = time.process_time()
            await run(way)
            if number:  # the first warms up
                found.append((time.process_time() - began) / count * 1e6)
    medians = {way: statistics.median(found) for way, found in spent.items()}
    ratio = medians["tunnel"] / medians["direct"]
    listed = ", ".join(f"{way} {value:.1f} µs" for way, value in medians.items())
    return f"{listed}, ratio {ratio:.2f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    uvloop.run(measured(given.requests, given.rounds))
