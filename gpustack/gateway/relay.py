"""The relay: a worker's public port. Bytes from gateways elsewhere to the engines here.

It knows the engines from the records that the agent keeps on disk, so it needs neither the agent
nor the server, and an agent may die without cutting a stream.

It speaks TLS with the certificate that the agent has made and told the server of, and nothing else.
Where gateways cannot dial it, it dials them: see `dial_out`.
"""

import asyncio
import logging
import re
import socket
import time
from pathlib import Path
from typing import Final

import msgspec

from gpustack.config.load import from_json
from gpustack.errors import GPUStackError, SettingsError, Unauthorized, Unavailable
from gpustack.forward.connection import Connection
from gpustack.forward.exchange import IGNORED, Exchange, Receiver
from gpustack.forward.listener import Server
from gpustack.forward.upstream import Address, Failure, Pool
from gpustack.gateway.dial_out import DialOut
from gpustack.gateway.life import end, tune_gc
from gpustack.gateway.passing import Passing, is_endless, without_private
from gpustack.gateway.probes import probe
from gpustack.gateway.routes import HEALTH
from gpustack.gateway.routes import RELAY as ROUTES
from gpustack.gateway.tls import Certificate
from gpustack.lib.decode import UNREADABLE
from gpustack.lib.role import Boot, leave
from gpustack.lib.secrets import same
from gpustack.schemas import wire

__all__ = ["ROUTES", "serve"]

logger = logging.getLogger(__name__)

_PRIVATE: Final = wire.PRIVATE_PREFIX.encode()
_INSTANCE: Final = wire.INSTANCE_HEADER.encode()
_REFUSED: Final = wire.RELAY_REFUSED_HEADER.encode()
_NUMBER: Final = re.compile(rb"[0-9]{1,18}")
#: Between two looks at the certificate, which the agent makes at its first start.
_AWAITED_S: Final = 0.1
_RENEWAL_S: Final = 1.0
_MISS_EVERY_S: Final = 0.1  # strangers asking for made-up instances must not busy the disk


class _Record(msgspec.Struct):
    """See schemas.engines.EngineRecord."""

    instance_id: int
    port: int
    secret_file: str


class Engines:
    """Instance -> loopback port and secret, as the records on disk say."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[int, tuple[int, str]] = {}
        self._changed_ns = -1
        self._read_at = float("-inf")

    def find(self, instance_id: int) -> tuple[int, str] | None:
        """Port and secret of an instance's engine; None: no engine of it runs here."""
        try:
            changed_ns = self._folder.stat().st_mtime_ns
        except FileNotFoundError:
            return None
        found = self._found.get(instance_id)
        # Two changes within one tick of the file system's clock look like one: hence the miss.
        missed = found is None and time.monotonic() - self._read_at > _MISS_EVERY_S
        if changed_ns != self._changed_ns or missed:
            self._read()
            self._changed_ns = changed_ns
            found = self._found.get(instance_id)
        return found

    def _read(self) -> None:
        self._read_at = time.monotonic()
        newest: dict[int, tuple[int, int, str]] = {}
        for path in self._folder.glob("*.json"):
            try:
                record = msgspec.json.decode(path.read_bytes(), type=_Record)
                secret = Path(record.secret_file).read_text().strip()
                written_ns = path.stat().st_mtime_ns
            except FileNotFoundError:
                continue  # it has just gone
            except (OSError, *UNREADABLE) as error:
                logger.warning("engine record %s is not readable: %s", path.name, error)
                continue
            known = newest.get(record.instance_id)
            if secret and (known is None or known[0] < written_ns):
                newest[record.instance_id] = (written_ns, record.port, secret)
        self._found = {id: (port, secret) for id, (_, port, secret) in newest.items()}


class Relay:
    """Called once per request, when its head is there."""

    def __init__(self, pool: Pool, engines: Engines, agent: Address) -> None:
        self._pool = pool
        self._engines = engines
        self._agent = agent

    def __call__(self, exchange: Exchange) -> Receiver:
        instance = exchange.header(_INSTANCE)
        if instance is not None:
            try:
                return self._to_engine(exchange, instance)
            except GPUStackError as error:
                refuse(exchange, error)
                return IGNORED
        if exchange.path == HEALTH.pattern and exchange.method in ("GET", "HEAD"):
            probe(exchange, None)
            return IGNORED
        exchange.endless = is_endless(exchange.query)
        headers = without_private(exchange.headers, _PRIVATE)
        return Passing(self._pool, exchange, self._agent, headers, _agent_away)

    def _to_engine(self, exchange: Exchange, instance: bytes) -> Receiver:
        known = _NUMBER.fullmatch(instance)
        engine = self._engines.find(int(instance)) if known else None
        port, secret = engine or (0, "")
        scheme, _, shown = (exchange.header(b"authorization") or b"").partition(b" ")
        right = scheme.lower() == b"bearer" and same(shown.decode("latin-1").strip(), secret)
        if engine is None or not right:
            # One answer for both: strangers need not learn which instances run here.
            raise Unauthorized("No engine here has this instance and secret.")
        return Passing(
            self._pool,
            exchange,
            ("127.0.0.1", port),
            without_private(exchange.headers, _PRIVATE),
            _engine_away,
            repeatable=True,  # as the gateway has it
            patience_s=None,
        )


def refuse(exchange: Exchange, error: GPUStackError) -> None:
    """Answer in the relay's own name: the gateway may try another instance."""
    exchange.respond_error(error, [(_REFUSED, b"1")])


def _engine_away(exchange: Exchange, failure: Failure) -> None:
    refuse(exchange, Unavailable(f"The engine does not answer: {failure}."))


def _agent_away(exchange: Exchange, failure: Failure) -> None:
    exchange.respond_error(Unavailable("The agent is away; it should be back in a moment."))


async def listen(server: Server, sock: socket.socket, file: Path) -> None:
    """Answer at `sock` with the certificate in `file`, once it is there, until cancelled."""
    said = ""
    while True:
        try:
            certificate = Certificate(file, file)
            break
        except SettingsError as error:
            if str(error) != said:
                said = str(error)
                logger.info("waiting for the agent's certificate: %s", error)
        await asyncio.sleep(_AWAITED_S)
    await server.listen(sock, tls=certificate.context)
    await certificate.follow(every_s=_RENEWAL_S)


async def serve(boot: Boot) -> None:
    """Serve until the launcher says otherwise; return when the last stream has ended."""
    settings = from_json(boot.settings)
    agent = ("127.0.0.1", int(boot.extra["agent_port"]))
    async with asyncio.TaskGroup() as group:
        pool = Pool(group)
        server = Server(Relay(pool, Engines(settings.data_dir / "engines"), agent))
        file = settings.data_dir / wire.WORKER_CERTIFICATE_FILE
        lasting = [group.create_task(listen(server, boot.socket("worker"), file))]
        out = None
        if settings.server_url is not None:
            out = DialOut(settings, settings.server_url, lambda: Connection(server, b"https"))
            lasting.append(group.create_task(out.run()))
        tune_gc()
        reason = await leave()
        for task in lasting:
            task.cancel()
        if out is not None:
            out.leave()
            await out.left()
        await end(server, reason)
        if out is not None:
            out.close()
        pool.close()
