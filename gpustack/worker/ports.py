"""Ports for engines: leased from one range, never to two at once."""

from collections import Counter

from gpustack.config.options import PortRange
from gpustack.errors import Unavailable
from gpustack.lib.net import can_bind

LOOPBACK = "127.0.0.1"


class PortLeases:
    """Which ports of the range engines hold. A port goes back only when its engine is gone.

    What an earlier agent left may have one port twice: it is free when the last of them is gone.
    """

    def __init__(self, pool: PortRange) -> None:
        self._pool = pool
        self._leased: Counter[int] = Counter()
        self._next = pool.first

    def lease(self) -> int:
        """A port that no engine holds and that nothing else listens on.

        The range is gone round, so that a port rests before it is used again.

        Raises:
            Unavailable: every port of the range is held or taken.
        """
        size = self._pool.last - self._pool.first + 1
        for step in range(size):
            port = self._pool.first + (self._next - self._pool.first + step) % size
            if port not in self._leased and can_bind(LOOPBACK, port):
                self._leased[port] += 1
                self._next = port + 1
                return port
        held = sum(self._pool.first <= port <= self._pool.last for port in self._leased)
        rest = f", {size - held} by other programs" if held < size else ""
        raise Unavailable(
            f"no free port in {self._pool}: {held} of {size} are held by engines of this worker"
            f"{rest}; widen --service-port-range"
        )

    def hold(self, port: int) -> None:
        """Mark the port of an engine that was found running."""
        self._leased[port] += 1

    def release(self, port: int) -> None:
        """One who held the port is gone."""
        self._leased[port] -= 1
        if self._leased[port] <= 0:
            del self._leased[port]
