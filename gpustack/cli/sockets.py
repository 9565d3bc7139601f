"""Every listening socket of a node but its engines': opened here, inherited by the roles."""

import errno
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from gpustack.cli.activation import Given, assign
from gpustack.config.options import Settings
from gpustack.errors import SettingsError
from gpustack.lib.platform import listen

LOOPBACK = "127.0.0.1"
#: Every address that this machine has, or gets.
_ANY = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
#: How long a port may be held by a role of an earlier life that is still on its way out.
PATIENCE_S = 5.0
#: Sockets by name, and the option that says the port of each.
OPTIONS = {
    "public": "--port",
    "tls": "--tls-port",
    "api": "--api-port",
    "worker": "--worker-port",
    "metrics": "--metrics-port",
    "worker-metrics": "--worker-metrics-port",
}

#: What a socket was opened for. Host None: a service manager opened it, wherever it liked.
Purpose = tuple[str | None, int]


class Sockets:
    """Open sockets by name: those of `OPTIONS`, agent, and own: the public one of this machine
    itself, where the public one speaks HTTPS.

    Args:
        inherited: what `handed_over` of the launcher before us said.
        given: what a service manager opened for us.
        patient: roles of an earlier life may still be on their way out.

    Raises:
        SettingsError: an address cannot be listened on; names the option that changes it.
    """

    def __init__(
        self,
        settings: Settings,
        inherited: dict[str, list[Any]],
        given: Iterable[Given] = (),
        *,
        patient: bool,
    ) -> None:
        self._open: dict[str, socket.socket] = {}
        self._purposes: dict[str, Purpose] = {}
        wanted = dict(_addresses(settings))
        for name, (fd, *purpose) in inherited.items():
            if name in wanted and _serves((purpose[0], purpose[1]), wanted[name]):
                os.set_inheritable(fd, False)
                self._open[name] = socket.socket(fileno=fd)
                self._purposes[name] = (purpose[0], purpose[1])
            else:
                os.close(fd)
        for name, one in assign(given, wanted, OPTIONS).items():
            self._open[name], self._purposes[name] = one, (None, wanted[name][1])
        for name, address in wanted.items():
            if name not in self._open:
                self._open[name] = _listen(name, *address, patient=patient)
                self._purposes[name] = address

    def fileno(self, name: str) -> int:
        return self._open[name].fileno()

    def address(self, name: str) -> tuple[str, int]:
        host, port = self._open[name].getsockname()[:2]
        return str(host), int(port)

    def reachable(self, name: str) -> tuple[str, int]:
        """The address by which this machine itself reaches the socket."""
        host, port = self.address(name)
        if host == "::":
            alone = self._open[name].getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
            return ("::1" if alone else LOOPBACK), port
        return {"0.0.0.0": LOOPBACK}.get(host, host), port

    def own(self) -> tuple[str, int]:
        """The address by which this machine itself reaches what is public, without TLS."""
        return self.reachable("own" if "own" in self else "public")

    def __contains__(self, name: str) -> bool:
        return name in self._open

    def port(self, name: str) -> int:
        return self.address(name)[1]

    @contextmanager
    def handed_over(self, settings: Settings) -> Iterator[dict[str, list[Any]]]:
        """Inside, the sockets that `settings` ask for survive exec, and new ones are open.

        Gives what the next launcher needs to know of them. One whose port is ours now, for
        something else, is left for that launcher to open: our roles hold it until they leave.

        Raises:
            SettingsError: a new address cannot be listened on, or one that a service manager
                opened is not asked for any more.
        """
        wanted = dict(_addresses(settings))
        ours = {self.port(name) for name in self._open}
        for name, (host, port) in self._purposes.items():
            if host is None and (name not in wanted or wanted[name][1] != port):
                raise SettingsError(
                    f"the service manager holds port {port} for {name}, and {OPTIONS[name]} "
                    "says another: change the socket's unit too, then stop and start the node"
                )
        told = {}
        with ExitStack() as fresh:
            for name, address in wanted.items():
                purpose: Purpose = address
                if name in self._open and _serves(self._purposes[name], address):
                    one, purpose = self._open[name], self._purposes[name]
                elif address[1] in ours:
                    continue
                else:
                    one = fresh.enter_context(_listen(name, *address, patient=False))
                one.set_inheritable(True)
                told[name] = [one.fileno(), *purpose]
            yield told


def _serves(purpose: Purpose, wanted: tuple[str, int]) -> bool:
    """Whether a socket that was opened for `purpose` is what is wanted."""
    return purpose in (wanted, (None, wanted[1]))


def _addresses(settings: Settings) -> list[tuple[str, tuple[str, int]]]:
    wanted = []
    if settings.is_server:
        wanted.append(("public", (settings.host, settings.port)))
        if settings.https_alone:
            wanted.append(("own", (LOOPBACK, 0)))  # any: the lock file says it
        elif settings.ssl_certfile is not None:
            wanted.append(("tls", (settings.host, settings.tls_port)))
        if settings.gateway_mode != "disabled":
            wanted.append(("api", (LOOPBACK, settings.api_port)))
        if not settings.disable_metrics:
            wanted.append(("metrics", (settings.host, settings.metrics_port)))
    if settings.has_worker:
        wanted.append(("worker", (_ANY, settings.worker_port)))
        wanted.append(("agent", (LOOPBACK, 0)))  # any: only the relay needs to know it
        if not settings.disable_worker_metrics:
            wanted.append(("worker-metrics", (settings.host, settings.worker_metrics_port)))
    return wanted


def _listen(name: str, host: str, port: int, *, patient: bool) -> socket.socket:
    deadline = time.monotonic() + (PATIENCE_S if patient else 0)
    while True:
        try:
            return listen(host, port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            option = OPTIONS.get(name, "")
            if error.errno == errno.EADDRINUSE:
                why = f"is taken by another program: free it, or give another {option}"
            elif error.errno == errno.EACCES:
                why = f"needs privileges: give a {option} above 1023, or run as root"
            else:
                why = f"cannot be listened on at {host}: {error.strerror}; see --host"
            raise SettingsError(f"{option} {port} {why}") from None
