"""Ports for tests, below the ephemeral range: there the kernel gives some to whoever connects."""

import os
import random
import socket

#: Each of the processes that run tests at the same time has a range of its own.
PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
PORTS = range(16000 + PROCESS * 2000, 18000 + PROCESS * 2000)


_next = random.randrange(PORTS.start, PORTS.stop)


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody listens on, and that were not given to
    others lately."""
    global _next
    for _ in range(len(PORTS)):
        first = _next if _next + count <= PORTS.stop else PORTS.start
        taken = next((port for port in range(first, first + count) if not _is_free(port)), None)
        _next = first + count if taken is None else taken + 1
        if taken is None:
            return first
    raise AssertionError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
        return True
