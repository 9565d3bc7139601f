"""What clients reach: the public ports, and what the settings of now put around the gateway."""

import asyncio
import logging
import socket
from contextlib import suppress
from typing import Any, Final

from gpustack.config.load import with_hot
from gpustack.config.options import Settings
from gpustack.errors import SettingsError, Unavailable
from gpustack.forward import tunnel
from gpustack.forward.exchange import IGNORED, Exchange, Receiver
from gpustack.forward.listener import App, Server
from gpustack.gateway import cors, proxies
from gpustack.gateway.answers import refuse
from gpustack.gateway.inference import open_requests
from gpustack.gateway.routes import is_inference
from gpustack.gateway.tls import Certificate
from gpustack.gateway.tunnels import Tunnels
from gpustack.lib.role import Boot

logger = logging.getLogger(__name__)

_LOOK_S: Final = 0.02
#: Between two looks at the certificate's files: they may be renewed, or mended.
_RENEWAL_S: Final = 60.0


class Public:
    """The public side of a gateway; listens nowhere yet.

    A certificate that cannot be used closes the HTTPS port and nothing else, until it can be.
    """

    def __init__(self, front: App, settings: Settings, tunnels: Tunnels) -> None:
        self.tunnels = tunnels
        self._front = front
        self._settings = settings
        self._certificate: Certificate | None = None
        self._tls: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
        self._reloaded = asyncio.Event()
        self.listener = Server(self._app(), upgrade=tunnel.PROTOCOL)

    async def listen(self, boot: Boot) -> None:
        """Answer at the public sockets among those that the launcher gave."""
        if "own" in boot.sockets:
            plain, tls = "own", "public"
        else:
            plain, tls = "public", "tls"
        await self.listener.listen(boot.socket(plain))
        if tls in boot.sockets:
            self._tls.set_result(boot.socket(tls))

    async def open_tls(self) -> None:
        """Speak HTTPS, once there is a certificate for it, with the newest one, until cancelled.

        Looks at each reload and by and by.
        """
        sock = await self._tls
        while not self.listener.draining:
            self._reloaded.clear()
            try:
                certificate = Certificate.of(self._settings)
            except SettingsError as error:
                logger.error("no HTTPS until this is mended: %s", error)  # noqa: TRY400
            else:
                if certificate is not None:
                    self._certificate = certificate
                    await self.listener.listen(sock, tls=certificate.context)
                    await certificate.follow(every_s=_RENEWAL_S)
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(_RENEWAL_S):
                    await self._reloaded.wait()

    def _app(self) -> App:
        app = cors.around(self._front, cors.Policy.of(self._settings))
        return proxies.around(app, self._settings.trusted_proxies)

    def reload(self, raw: dict[str, Any]) -> None:
        """Take in what a running node may change, and the certificate as its files are now."""
        self._settings = with_hot(self._settings, raw)
        self.listener.app = self._app()
        self._reloaded.set()
        if self._certificate is not None:
            self._certificate.reload()

    async def finish_inference(self, *, limit_s: float = 30.0) -> None:
        """Refuse new requests to models, and return when the open ones have ended.

        All else is served on. After `limit_s` those that are still open are left as they are.
        """
        self._front = _refusing_inference(self._front)
        self.listener.app = self._app()
        try:
            async with asyncio.timeout(limit_s):
                while any(open_requests(self.listener)):  # noqa: ASYNC110  once in a life: no event is worth it
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            pass

    def ends_revoked(self) -> bool:
        """Whether open requests to models end when their credential is withdrawn."""
        return self._settings.revoked_streams == "end"


def _refusing_inference(front: App) -> App:
    def answer(exchange: Exchange) -> Receiver:
        if not is_inference(exchange.method, exchange.path):
            return front(exchange)
        refuse(exchange, Unavailable("This node is stopping."))
        return IGNORED

    return answer
