"""What the service manager is told of this node: sd_notify(3)."""

import logging
import socket
import time
from collections.abc import MutableMapping

logger = logging.getLogger(__name__)

#: For the launcher alone: what a child says would be taken for the node's word.
VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")
#: For a manager that is busy.
SEND_S = 1.0


def take(environment: MutableMapping[str, str]) -> str:
    """Where the service manager listens; empty: nowhere. The variables are unset."""
    said = {name: environment.pop(name, "") for name in VARIABLES}
    return said["NOTIFY_SOCKET"]


class Notifier:
    """Says how the node is. A manager that does not listen costs nothing but a warning.

    Args:
        address: a path, or a name in the abstract name space after `@`; empty: nobody listens.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._silenced = False

    def ready(self, status: str) -> None:
        """The node serves. Also ends what `reloading` began."""
        self._say("READY=1", f"STATUS={status}")

    def reloading(self, status: str) -> None:
        """The node takes in new settings, or replaces itself, until it is ready again."""
        now_us = time.monotonic_ns() // 1000
        self._say("RELOADING=1", f"MONOTONIC_USEC={now_us}", f"STATUS={status}")

    def stopping(self, status: str) -> None:
        self._say("STOPPING=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        self._say(f"STATUS={status}")

    def _say(self, *lines: str) -> None:
        if not self.address:
            return
        message = "\n".join(" ".join(line.split("\n")) for line in lines)
        name = self.address
        place = "\0" + name[1:] if name.startswith("@") else name
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to:
                to.settimeout(SEND_S)
                to.sendto(message.encode(errors="replace"), place)
        except OSError as error:
            if not self._silenced:
                logger.warning("NOTIFY_SOCKET %s cannot be told: %s", name, error)
            self._silenced = True
