"""What systemd does for a service: opens its sockets, and listens to what it says of itself."""

import fcntl
import socket
import sys
from collections.abc import Callable

from tests.support.node import Node
from tests.support.wait import soon

#: Puts descriptors where a service looks for them, then becomes the service, in one process.
_STARTER = """
import os, sys
names, fds, command = sys.argv[1], sys.argv[2].split(), sys.argv[3:]
for place, fd in enumerate(fds, 3):
    os.dup2(int(fd), place)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": names}
os.execv(command[0], command)
"""
#: Beyond those that the starter writes to.
_HIGH_FD = 100


def starter(*given: tuple[str, socket.socket]) -> tuple[list[str], tuple[int, ...]]:
    """A command that starts another with these sockets, and the descriptors that it inherits."""
    fds = tuple(fcntl.fcntl(one, fcntl.F_DUPFD, _HIGH_FD) for _, one in given)
    names = ":".join(name for name, _ in given)
    return [sys.executable, "-c", _STARTER, names, " ".join(map(str, fds))], fds


class ServiceManager:
    """Listens where NOTIFY_SOCKET says.

    Attributes:
        said: the messages so far, each as its assignments.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.said: list[dict[str, str]] = []
        self._ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ear.bind("\0" + address[1:] if address.startswith("@") else address)
        self._ear.setblocking(False)

    def __enter__(self) -> "ServiceManager":
        return self

    def __exit__(self, *_: object) -> None:
        self._ear.close()

    def manage(self, node: Node, *given: tuple[str, socket.socket]) -> Node:
        """Have `node` start as a service with these sockets, by name."""
        node.environment["NOTIFY_SOCKET"] = self.address
        if given:
            node.starter, node.fds = starter(*given)
        return node

    def until(self, wanted: Callable[[dict[str, str]], bool], what: str) -> list[dict[str, str]]:
        """Wait for a message; answers those since the last that was waited for, with it."""
        heard: list[dict[str, str]] = []

        def came() -> bool:
            while True:
                try:
                    lines = self._ear.recv(65536).decode().splitlines()
                except BlockingIOError:
                    return False
                message = dict(line.split("=", 1) for line in lines)
                self.said.append(message)
                heard.append(message)
                if wanted(message):
                    return True

        soon(came, f"{what}; it said {heard}", within_s=30)
        return heard
