"""The agent's HTTP API, on a loopback port behind the relay: for the server, and for nobody else.

Everything but `/healthz` asks for the secret that this worker got when it registered.
"""

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Set
from contextlib import aclosing, closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs

from gpustack.errors import BadRequest, NotFound, Unauthorized
from gpustack.forward.listener import Exchange, Server, asynchronous
from gpustack.forward.metrics import Gather, text
from gpustack.lib import log_level
from gpustack.lib.secrets import same
from gpustack.schemas.engines import Engines
from gpustack.worker.log_reading import Run, followed, tail, whole
from gpustack.worker.supervisor.engine_log import log_path, runs_before


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
ENGINES = Route("GET", "/v2/engines")
METRICS = Route("GET", "/metrics")
LEVEL = Route("GET", "/debug/log_level")
SET_LEVEL = Route("PUT", "/debug/log_level")

#: Every way in: a test elsewhere goes through them.
ROUTES = (HEALTH, LOGS, ENGINES, METRICS, LEVEL, SET_LEVEL)

_COUNT = re.compile(r"[0-9]{1,18}")
_SECONDS = re.compile(r"[0-9]{1,12}(\.[0-9]{1,6})?")
#: What a log is sent as (the engine's bytes go as they are), and a level.
_TEXT = [(b"content-type", b"text/plain; charset=utf-8")]
_JSON = [(b"content-type", b"application/json")]


class Api:
    """Answers on one socket.

    Args:
        secret: what callers must show now; None before this worker has ever registered.
        instances: those that may still write to their logs.
        engines: what runs now.
        metrics: of now.
    """

    def __init__(
        self,
        *,
        log_dir: Path,
        secret: Callable[[], str | None],
        instances: Callable[[], Set[int]],
        engines: Callable[[], Awaitable[Engines]],
        metrics: Gather,
    ) -> None:
        self._log_dir = log_dir
        self._secret = secret
        self._instances = instances
        self._engines = engines
        self._metrics = metrics

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
            elif route is ENGINES:
                shown = await self._engines()
                exchange.respond(200, _JSON, shown.model_dump_json().encode())
            elif route is METRICS:
                kind, body = await asyncio.to_thread(text, await self._metrics())
                exchange.respond(200, [(b"content-type", kind.encode())], body)
            else:
                await _level(exchange)
            return
        self._check(exchange)
        raise NotFound(f"the worker has no {exchange.method} {exchange.path}")

    def _check(self, exchange: Exchange) -> None:
        shown = (exchange.header(b"authorization") or b"").decode("latin-1")
        scheme, _, token = shown.partition(" ")
        expected = self._secret()
        if not expected or scheme.lower() != "bearer" or not same(token.strip(), expected):
            raise Unauthorized("the worker's API answers its server only")

    async def _logs(self, exchange: Exchange, instance_id: int) -> None:
        """The engine's bytes as they are, or as many of the last as are asked for."""
        asked = parse_qs(exchange.query)
        lines, since_s = _count(asked, "tail"), _seconds(asked, "since")
        follow, back = _flag(asked, "follow"), _runs_back(asked)
        path = log_path(self._log_dir, instance_id)
        with closing(_opened(path, instance_id, back)) as run:
            start = max(
                run.begins if lines is None else await tail(run, lines),
                run.begins if since_s is None else run.since(since_s),
            )
            exchange.endless = follow = follow and not back
            exchange.start(200, _TEXT)
            exchange.write(b"")

            def wanted() -> bool:
                return instance_id in self._instances()

            reading = followed(path, run, start, wanted) if follow else whole(run, start)
            async with aclosing(reading) as pieces:
                async for piece in pieces:
                    await exchange.send(piece)


def _opened(path: Path, instance_id: int, back: int) -> Run:
    """The log of the present run, or of the run `back` before it that said anything."""
    try:
        return Run(path if not back else runs_before(path)[back - 1])
    except (FileNotFoundError, IndexError):
        kept = len(runs_before(path))
        which = "log" if not back else f"log of {back} runs before" if kept else "previous log"
        there = f": {kept} earlier are kept" if back and kept else ""
        raise NotFound(f"instance {instance_id} has no {which} on this worker{there}") from None


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


def _seconds(asked: dict[str, list[str]], name: str) -> float | None:
    value = asked.get(name, [""])[-1]
    if value and not _SECONDS.fullmatch(value):
        raise BadRequest(f"{name}: want a number of seconds, got {value!r}")
    return float(value) if value else None


def _runs_back(asked: dict[str, list[str]]) -> int:
    """How many runs before the present one: 0 for that itself."""
    value = asked.get("previous", ["0"])[-1].lower()
    value = {"": "0", "false": "0", "true": "1"}.get(value, value)
    if not _COUNT.fullmatch(value):
        raise BadRequest(f"previous: want true, false or a number of runs, got {value!r}")
    return int(value)


def _flag(asked: dict[str, list[str]], name: str) -> bool:
    value = asked.get(name, ["false"])[-1].lower()
    if value not in {"true", "false", "1", "0", ""}:
        raise BadRequest(f"{name}: want true or false, got {value!r}")
    return value in {"true", "1"}
