"""The agent's HTTP API, on a loopback port behind the relay: for the server, and for nobody else.

Everything but `/healthz` asks for the secret that this worker got when it registered.
"""

import asyncio
import re
import socket
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs

from gpustack.errors import BadRequest, NotFound, Unauthorized
from gpustack.forward.listener import Exchange, Server, asynchronous
from gpustack.lib import log_level
from gpustack.lib.secrets import same
from gpustack.worker.log_reading import followed, log_offset, whole
from gpustack.worker.supervisor.engine_log import log_path, previous_path


@dataclass(frozen=True, slots=True)
class Route:
    """A way in.

    Attributes:
        pattern: of the whole path; {name} stands for a number.
        public: answered without the secret.
    """

    method: str
    pattern: str
    public: bool = False

    def match(self, method: str, path: str) -> dict[str, int] | None:
        """The numbers in `path` if this is its route."""
        expression = re.sub(r"\{(\w+)\}", r"(?P<\1>[0-9]{1,18})", self.pattern)
        found = re.fullmatch(expression, path) if method == self.method else None
        return {name: int(value) for name, value in found.groupdict().items()} if found else None


HEALTH = Route("GET", "/healthz", public=True)
LOGS = Route("GET", "/v2/logs/{instance_id}")
LEVEL = Route("GET", "/debug/log_level")
SET_LEVEL = Route("PUT", "/debug/log_level")

#: Every way in: a test elsewhere goes through them.
ROUTES = (HEALTH, LOGS, LEVEL, SET_LEVEL)

_COUNT = re.compile(r"[0-9]{1,18}")
#: What a log is sent as (the engine's bytes go as they are), and a level.
_TEXT = [(b"content-type", b"text/plain; charset=utf-8")]


class Api:
    """Answers on one socket.

    Args:
        secret: what callers must show now; None before this worker has ever registered.
    """

    def __init__(self, *, log_dir: Path, secret: Callable[[], str | None]) -> None:
        self._log_dir = log_dir
        self._secret = secret

    async def serve(self, sock: socket.socket) -> None:
        """Answer until cancelled; then every connection is closed."""
        async with asyncio.TaskGroup() as group:
            server = Server(asynchronous(self.answer, group))
            await server.listen(sock)
            try:
                await asyncio.Event().wait()
            finally:
                server.close()

    async def answer(self, exchange: Exchange) -> None:
        for route in ROUTES:
            numbers = route.match(exchange.method, exchange.path)
            if numbers is None:
                continue
            if not route.public:
                self._check(exchange)
            if route is HEALTH:
                exchange.respond(200, body=b"ok\n")
            elif route is LOGS:
                await self._logs(exchange, numbers["instance_id"])
            else:
                await _level(exchange)
            return
        self._check(exchange)
        raise NotFound(f"the worker has no {exchange.method} {exchange.path}")

    def _check(self, exchange: Exchange) -> None:
        shown = (exchange.header(b"authorization") or b"").decode("latin-1")
        scheme, _, token = shown.partition(" ")
        expected = self._secret()
        if expected is None or scheme.lower() != "bearer" or not same(token.strip(), expected):
            raise Unauthorized("the worker's API answers its server only")

    async def _logs(self, exchange: Exchange, instance_id: int) -> None:
        asked = parse_qs(exchange.query)
        tail, follow = _count(asked, "tail"), _flag(asked, "follow")
        path = log_path(self._log_dir, instance_id)
        if _flag(asked, "previous"):
            path, follow = previous_path(path), False
        try:
            file = path.open("rb")
        except FileNotFoundError:
            which = "previous log" if "previous" in asked else "log"
            raise NotFound(f"instance {instance_id} has no {which} on this worker") from None
        with file:
            start = await log_offset(file, tail)
            exchange.endless = follow
            exchange.start(200, _TEXT)
            exchange.write(b"")
            reading = followed(path, file, start) if follow else whole(file, start)
            async with aclosing(reading) as pieces:
                async for piece in pieces:
                    await exchange.send(piece)


async def _level(exchange: Exchange) -> None:
    """Answer the agent's log level; PUT changes it first."""
    if exchange.method == "PUT":
        try:
            log_level.change(log_level.parse(await exchange.read(log_level.LIMIT_BYTES)))
        except ValueError as error:
            raise BadRequest(str(error)) from None
    exchange.respond(200, _TEXT, log_level.current().encode())


def _count(asked: dict[str, list[str]], name: str) -> int | None:
    value = asked.get(name, [""])[-1]
    if value and not _COUNT.fullmatch(value):
        raise BadRequest(f"{name}: want a whole number of lines, got {value!r}")
    return int(value) if value else None


def _flag(asked: dict[str, list[str]], name: str) -> bool:
    value = asked.get(name, ["false"])[-1].lower()
    if value not in {"true", "false", "1", "0", ""}:
        raise BadRequest(f"{name}: want true or false, got {value!r}")
    return value in {"true", "1"}
