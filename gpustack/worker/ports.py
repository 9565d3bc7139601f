"""Ports for engines: leased from one range, never to two at once."""

from gpustack.config.options import PortRange
from gpustack.errors import Unavailable
from gpustack.lib.net import can_bind

LOOPBACK = "127.0.0.1"


class PortLeases:
    """Which ports of the range engines hold. A port goes back only when its engine is gone."""

    def __init__(self, pool: PortRange) -> None:
        self._pool = pool
        self._leased: set[int] = set()
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
                self._leased.add(port)
                self._next = port + 1
                return port
        raise Unavailable(
            f"no free port in {self._pool}: {len(self._leased)} of {size} are held by engines of "
            "this worker, the rest by other programs; widen --service-port-range"
        )

    def hold(self, port: int) -> None:
        """Mark the port of an engine that was found running."""
        self._leased.add(port)

    def release(self, port: int) -> None:
        self._leased.discard(port)
