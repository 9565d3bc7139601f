"""Every listening socket of a node but its engines': opened here, inherited by the roles."""

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from gpustack.config.options import Settings
from gpustack.errors import SettingsError
from gpustack.lib.platform import listen

LOOPBACK = "127.0.0.1"
#: How long a port may be held by a role of an earlier life that is still on its way out.
PATIENCE_S = 5.0


class Sockets:
    """Open sockets by name: public, api, worker, agent.

    Args:
        inherited: what `handed_over` of the launcher before us said.
        patient: roles of an earlier life may still be on their way out.

    Raises:
        SettingsError: an address cannot be listened on; names the option that changes it.
    """

    def __init__(
        self, settings: Settings, inherited: dict[str, list[Any]], *, patient: bool
    ) -> None:
        self._open: dict[str, socket.socket] = {}
        self._addresses = dict(_addresses(settings))
        kept = {
            name: socket.socket(fileno=fd)
            for name, (fd, host, port) in inherited.items()
            if self._addresses.get(name) == (host, port)
        }
        for name, (fd, *_) in inherited.items():
            if name in kept:
                os.set_inheritable(fd, False)
            else:
                os.close(fd)
        for name, (host, port) in self._addresses.items():
            self._open[name] = kept.get(name) or _listen(name, host, port, patient=patient)

    def fileno(self, name: str) -> int:
        return self._open[name].fileno()

    def address(self, name: str) -> tuple[str, int]:
        host, port = self._open[name].getsockname()[:2]
        return str(host), int(port)

    def port(self, name: str) -> int:
        return self.address(name)[1]

    @contextmanager
    def handed_over(self, settings: Settings) -> Iterator[dict[str, list[Any]]]:
        """Inside, the sockets that `settings` ask for survive exec, and new ones are open.

        Gives what the next launcher needs to know of them. One whose port is ours now, for
        something else, is left for that launcher to open: our roles hold it until they leave.

        Raises:
            SettingsError: a new address cannot be listened on.
        """
        ours = {self.port(name) for name in self._open}
        told = {}
        with ExitStack() as fresh:
            for name, (host, port) in _addresses(settings):
                if self._addresses.get(name) == (host, port):
                    one = self._open[name]
                elif port in ours:
                    continue
                else:
                    one = fresh.enter_context(_listen(name, host, port, patient=False))
                one.set_inheritable(True)
                told[name] = [one.fileno(), host, port]
            yield told


def _addresses(settings: Settings) -> list[tuple[str, tuple[str, int]]]:
    wanted = []
    if settings.is_server:
        wanted.append(("public", (settings.host, settings.port)))
        wanted.append(("api", (LOOPBACK, settings.api_port)))
    if settings.has_worker:
        wanted.append(("worker", ("0.0.0.0", settings.worker_port)))
        wanted.append(("agent", (LOOPBACK, 0)))  # any: only the relay needs to know it
    return wanted


_OPTIONS = {"public": "--port", "api": "--api-port", "worker": "--worker-port"}


def _listen(name: str, host: str, port: int, *, patient: bool) -> socket.socket:
    deadline = time.monotonic() + (PATIENCE_S if patient else 0)
    while True:
        try:
            return listen(host, port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            option = _OPTIONS.get(name, "")
            if error.errno == errno.EADDRINUSE:
                why = f"is taken by another program: free it, or give another {option}"
            elif error.errno == errno.EACCES:
                why = f"needs privileges: give a {option} above 1023, or run as root"
            else:
                why = f"cannot be listened on at {host}: {error.strerror}; see --host"
            raise SettingsError(f"{option} {port} {why}") from None
