"""Sockets that a service manager opened for this node: sd_listen_fds(3)."""

import logging
import os
import socket
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass

from gpustack.errors import SettingsError
from gpustack.lib.net import is_loopback

logger = logging.getLogger(__name__)

FIRST_FD = 3
#: What says how a service was started: for the launcher alone, so no child may inherit it.
VARIABLES = ("LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "LISTEN_PIDFDID")
_ANY = {"0.0.0.0", "::"}


@dataclass(frozen=True)
class Given:
    """A listening socket that was opened for us.

    Attributes:
        name: what `FileDescriptorName=` says; without one, the name of the socket's unit.
    """

    name: str
    socket: socket.socket

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.socket.getsockname()[:2]
        return str(host), int(port)

    def __str__(self) -> str:
        host, port = self.address
        return f"socket {self.name or 'without a name'} of port {port} at {host}"


def take(environment: MutableMapping[str, str]) -> list[Given]:
    """The sockets that are meant for this process. Their variables are unset, whoever they are for.

    Raises:
        SettingsError: the variables contradict the descriptors.
    """
    said = {name: environment.pop(name, "") for name in VARIABLES}
    count, pid = said["LISTEN_FDS"], said["LISTEN_PID"]
    if pid != str(os.getpid()):
        if count:
            logger.warning("LISTEN_FDS is for pid %s, not for this one: ignored", pid)
        return []
    if not (count.isascii() and count.isdigit() and len(count) < 5):
        raise SettingsError(f"LISTEN_FDS: want a number of descriptors, got {count[:40]!a}")
    names = said["LISTEN_FDNAMES"].split(":") if said["LISTEN_FDNAMES"] else [""] * int(count)
    if len(names) != int(count):
        raise SettingsError(f"LISTEN_FDNAMES names {len(names)} sockets of LISTEN_FDS={count}")
    return [Given(name, _listening(fd, name)) for fd, name in enumerate(names, FIRST_FD)]


def _listening(fd: int, name: str) -> socket.socket:
    try:
        found = socket.socket(fileno=fd)
        listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise SettingsError(f"LISTEN_FDS: descriptor {fd} ({name}): {error.strerror}") from None
    if not listens or found.family not in (socket.AF_INET, socket.AF_INET6):
        raise SettingsError(f"LISTEN_FDS: descriptor {fd} ({name}) is no listening TCP socket")
    os.set_inheritable(fd, False)
    found.setblocking(False)
    return found


def assign(
    given: Iterable[Given], wanted: Mapping[str, tuple[str, int]], options: Mapping[str, str]
) -> dict[str, socket.socket]:
    """Which of the node's sockets each given one is: by its name, else by address and port.

    The port is always the option's, since other parts of the product go by it; a name leaves the
    address to the unit.

    Args:
        wanted: name -> address of the sockets that this node listens on.
        options: name -> the option that says the port.

    Raises:
        SettingsError: one is none of the node's. Its clients would wait for ever.
    """
    found: dict[str, socket.socket] = {}
    for one in given:
        name = one.name if one.name in options else _by_address(one, wanted)
        if name not in wanted:
            raise SettingsError(
                f"LISTEN_FDS: {one} is none that this node listens on: name it one of "
                f"{', '.join(n for n in wanted if n in options)}, or give the option of its port"
            )
        host, port = wanted[name]
        if one.address[1] != port:
            raise SettingsError(f"LISTEN_FDS: {one} contradicts {options[name]} {port}")
        if is_loopback(host) and not is_loopback(one.address[0]):
            raise SettingsError(f"LISTEN_FDS: {one} is open to others; {name} is for {host} alone")
        if name in found:
            raise SettingsError(f"LISTEN_FDS: {one} is the second one that is {name}; give one")
        found[name] = one.socket
    return found


def _by_address(one: Given, wanted: Mapping[str, tuple[str, int]]) -> str:
    host, port = one.address
    for name, (wanted_host, wanted_port) in wanted.items():
        if port == wanted_port and (host == wanted_host or _ANY.issuperset({host, wanted_host})):
            return name
    return ""
