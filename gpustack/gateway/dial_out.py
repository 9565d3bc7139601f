"""The relay's tunnels to the gateway processes of its server, where those cannot dial it.

The processes of a node share their listening socket, and the kernel picks the one that a new
connection reaches. Each says in the handshake which it is and how many there are, so the relay
dials, several times at once, until it has a tunnel to each; and now and then once more, for nodes
that it has not met. It knows whom to dial from the settings and the membership that the agent keeps
on disk, so it needs neither the agent nor the server.
"""

import asyncio
import logging
import random
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from gpustack.config.options import Settings
from gpustack.errors import SettingsError
from gpustack.forward.http1 import Headers, first, write_head
from gpustack.forward.tunnel import PROTOCOL, Tunnel
from gpustack.gateway.process import Process
from gpustack.lib import trust
from gpustack.lib.backoff import delay_s
from gpustack.lib.decode import UNREADABLE
from gpustack.lib.net import url_host
from gpustack.lib.platform import notice_dead_peer
from gpustack.lib.secrets import new_secret
from gpustack.schemas import wire

logger = logging.getLogger(__name__)

#: Between two looks at the membership.
_LOOK_S: Final = 1.0
_HANDSHAKE_S: Final = 10.0
#: Between two looks for nodes that were not met yet, once each process that was met has a tunnel.
_EXPLORE_S: Final = 30.0
#: At once, at most: one for each process that is missing, and twice as many after each round that
#: met none, since the kernel may have its favourites among the processes.
_AT_ONCE: Final = 8
_REFUSED_FIRST_S, _REFUSED_LIMIT_S = 0.2, 10.0
_MISSED_FIRST_S, _MISSED_LIMIT_S = 0.05, 2.0
_HEAD_BYTES: Final = 16 * 1024


class _Membership(msgspec.Struct):
    """See worker.enrolment.Membership."""

    credential: str
    server_fingerprint: str | None = None
    tunnel: bool = False


class Refused(Exception):
    """No tunnel: a sentence says why."""


class DialOut:
    """Keeps a tunnel to each gateway process while the worker is to be reached by tunnel.

    Args:
        server_url: where the gateways' public port is.
        accept: makes what serves a stream.

    Attributes:
        said: why there is no tunnel at all, as the log has it; empty: there is one.
    """

    def __init__(
        self, settings: Settings, server_url: str, accept: Callable[[], asyncio.Protocol]
    ) -> None:
        self._settings = settings
        self._url = server_url
        self._accept = accept
        self._file = settings.data_dir / "worker_credential"
        self._life = new_secret()
        self._loop = asyncio.get_running_loop()
        self._tunnels: dict[Tunnel, Process] = {}
        self._changed = asyncio.Event()
        self._due = 0.0  # when to dial again, by the loop's clock
        self._failures = self._misses = 0
        self.said = ""

    async def run(self) -> None:
        """Keep the tunnels until cancelled."""
        while True:
            known = _membership(self._file)
            if known is None or not (self._settings.proxy_mode == "tunnel" or known.tunnel):
                self.leave()
            elif self._loop.time() >= self._due:
                await self._dial_all(known)
            self._changed.clear()
            wait_s = min(max(self._due - self._loop.time(), 0.01), _LOOK_S)
            try:
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def leave(self) -> None:
        """Want no new streams; open ones are finished."""
        for tunnel in list(self._tunnels):
            tunnel.leave()

    async def left(self, *, limit_s: float = 2.0) -> None:
        """Return when no gateway opens streams any more, or after `limit_s`."""
        try:
            async with asyncio.timeout(limit_s):
                for tunnel in list(self._tunnels):
                    await tunnel.left.wait()
        except TimeoutError:
            pass

    def close(self) -> None:
        """End the tunnels and their streams."""
        for tunnel in list(self._tunnels):
            tunnel.abort()

    # --- which there are -----------------------------------------------------------------

    def _live(self) -> dict[str, Process]:
        """The processes to which there is a tunnel that lasts, by their life."""
        return {its.life: its for tunnel, its in self._tunnels.items() if not tunnel.leaving}

    def _missing(self) -> int:
        """How many processes of the nodes that were met have no tunnel; 1: none was met."""
        live = self._live().values()
        counts = {its.node: its.count for its in live}
        return sum(counts.values()) - len(live) if counts else 1

    def _moved(self, tunnel: Tunnel) -> None:
        if tunnel.over:
            self._tunnels.pop(tunnel, None)
        # At once, but not all workers of a gateway that has ended in the same moment.
        soon = self._loop.time() + random.uniform(0.0, 0.2)  # noqa: S311
        self._due = min(self._due, soon)
        self._changed.set()

    # --- dialling ------------------------------------------------------------------------

    async def _dial_all(self, known: _Membership) -> None:
        """Dial as often as it may take, at once, and say when to go on."""
        before = self._live().keys()
        number = min(max(self._missing(), 1) << min(self._misses, 8), _AT_ONCE)
        tries = [self._dial(known) for _ in range(number)]
        outcomes = await asyncio.gather(*tries, return_exceptions=True)
        refusals = [one for one in outcomes if isinstance(one, BaseException)]
        for one in refusals:
            if not isinstance(one, Refused):
                raise one
        met = bool(self._live().keys() - before)
        if len(refusals) == number:
            self._failures += 1
            self._say(str(refusals[0]))
            pause_s = delay_s(self._failures, first_s=_REFUSED_FIRST_S, limit_s=_REFUSED_LIMIT_S)
        else:
            self._failures, self.said = 0, ""
            if self._missing() <= 0:
                self._misses, pause_s = 0, _EXPLORE_S
            else:
                self._misses = 0 if met else self._misses + 1
                pause_s = delay_s(self._misses, first_s=_MISSED_FIRST_S, limit_s=_MISSED_LIMIT_S)
        self._due = self._loop.time() + random.uniform(0.5, 1.0) * pause_s  # noqa: S311

    def _say(self, why: str) -> None:
        if why != self.said:
            self.said = why
            logger.warning("no tunnel to %s, trying again: %s", self._url, why)

    async def _dial(self, known: _Membership) -> None:
        """Dial once; a process to which there is no tunnel yet has one then.

        Raises:
            Refused: nobody there makes tunnels, for now or for us.
        """
        url = urlsplit(self._url)
        host, encrypted = url.hostname or "", url.scheme == "https"
        port = url.port or (443 if encrypted else 80)
        try:
            tls = self._trust(known) if encrypted else None
            async with asyncio.timeout(_HANDSHAKE_S):
                _, asking = await self._loop.create_connection(_Asking, host, port, ssl=tls)
                try:
                    asking.ask(
                        self._request(known, url.path.rstrip("/"), f"{url_host(host)}:{port}")
                    )
                    status, headers = await asking.answer
                    self._take(asking, status, headers)
                finally:
                    asking.drop()
        except TimeoutError:
            raise Refused(f"no answer in {_HANDSHAKE_S:g} s") from None
        except (OSError, SettingsError) as error:
            raise Refused(trust.why(error, host)) from None

    def _trust(self, known: _Membership) -> ssl.SSLContext:
        """Whom the agent believes that it is the server; see worker.enrolment.server_trust."""
        settings, wanted = self._settings, self._settings.server_fingerprint
        if wanted is None and settings.server_ca is None:
            wanted = known.server_fingerprint
        return trust.of_server(settings.server_ca, wanted)

    def _request(self, known: _Membership, below: str, authority: str) -> bytes:
        lives = ",".join(self._live())
        return write_head(
            f"GET {below}{wire.TUNNEL_PATH} HTTP/1.1\r\n".encode(),
            [
                (b"host", authority.encode()),
                (b"connection", b"upgrade"),
                (b"upgrade", PROTOCOL),
                (b"authorization", b"Bearer " + known.credential.encode()),
                (wire.HAS_HEADER.encode(), lives.encode()),
                (wire.RELAY_HEADER.encode(), self._life.encode()),
            ],
        )

    def _take(self, asking: "_Asking", status: int, headers: Headers) -> None:
        try:
            process = Process.parse(first(headers, wire.PROCESS_HEADER.encode()) or b"")
        except ValueError:
            raise Refused(_sentence(status)) from None
        if status != 101:
            return  # there is a tunnel to this process already
        tunnel = Tunnel(accept=self._accept, changed=self._moved)
        if process.life in self._live():
            return  # which another attempt has just made: this one is dropped
        self._tunnels[tunnel] = process
        asking.hand_over(tunnel)
        logger.info("tunnel to gateway process %d of %d", process.index + 1, process.count)


class _Asking(asyncio.Protocol):
    """The handshake."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[tuple[int, Headers]] = (
            asyncio.get_running_loop().create_future()
        )
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._headers: Headers = []
        self._fed = 0
        self._rest = b""

    def ask(self, request: bytes) -> None:
        if self._transport is not None:
            self._transport.write(request)

    def hand_over(self, tunnel: Tunnel) -> None:
        """Let `tunnel` have the connection."""
        transport, self._transport = self._transport, None
        if transport is None:
            tunnel.connection_lost(None)
            return
        transport.set_protocol(tunnel)
        tunnel.connection_made(transport)
        if self._rest:
            tunnel.data_received(self._rest)

    def drop(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        if not self.answer.done():
            self.answer.cancel()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if (sock := transport.get_extra_info("socket")) is not None:
            notice_dead_peer(sock)

    def data_received(self, data: bytes) -> None:
        if self.answer.done():
            self._rest += data
            return
        self._fed += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as stop:
            self._rest = data[stop.args[0] :]
        except httptools.HttpParserError as error:
            self._fail(f"it does not speak HTTP there ({error})")
        if self._fed > _HEAD_BYTES:
            self._fail("an answer without end")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._fail(trust.why(exc, "") if exc else "the connection was closed")

    def _fail(self, why: str) -> None:
        if not self.answer.done():
            self.answer.set_exception(Refused(why))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value or b""))

    def on_headers_complete(self) -> None:
        if not self.answer.done():
            self.answer.set_result((self._parser.get_status_code(), self._headers))


def _sentence(status: int) -> str:
    """Why there is no tunnel, as an answer without a process says it."""
    if status in (401, 403):
        return "this worker's credential is not known there"
    if status == 503:
        return "the gateway there is starting, ending, or cannot ask its server who this is"
    return (
        f"answer {status}: want the public port of a server of this version, and what stands "
        "before it must let Upgrade through"
    )


def _membership(file: Path) -> _Membership | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Membership)
    except FileNotFoundError:
        return None
    except (OSError, *UNREADABLE) as error:
        logger.warning("%s is not readable: %s", file, error)
        return None
