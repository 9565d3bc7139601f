"""Waiting until an engine has answered what it has begun to answer."""

import asyncio
import contextlib
from collections.abc import Collection
from typing import Final

from gpustack.lib.secrets import Secret
from gpustack.worker.ports import LOOPBACK

#: Seconds between two looks. Two in a row must find it idle: what it counts as answered may
#: still be on its way out.
LOOK_EVERY_S: Final = 0.2
#: For its metrics to come. An engine that takes longer is busy.
PATIENCE_S: Final = 5.0
METRICS_BYTES: Final = 4 * 2**20


async def until_idle(port: int, secret: Secret, gauges: Collection[str]) -> None:
    """Return once the engine has no request, or nobody can tell.

    Args:
        gauges: its metrics whose sum is the number of requests that it has.
    """
    idle = 0
    while gauges and idle < 2:
        try:
            async with asyncio.timeout(PATIENCE_S):
                metrics = await _metrics(port, secret)
        except TimeoutError:
            idle = 0  # too busy to say so
        except (OSError, ValueError):
            return  # it does not listen any more
        else:
            idle = 0 if requests(metrics, gauges) > 0 else idle + 1
        await asyncio.sleep(LOOK_EVERY_S)


def requests(metrics: str, gauges: Collection[str]) -> float:
    """The sum of `gauges` in a Prometheus text; 0 when they are not in it."""
    total = 0.0
    for line in metrics.splitlines():
        name, _, rest = line.partition("{") if "{" in line else line.partition(" ")
        if name.strip() in gauges:
            with contextlib.suppress(ValueError, IndexError):
                total += float(rest.rpartition("}")[2].split()[0])
    return total


async def _metrics(port: int, secret: Secret) -> str:
    request = (
        f"GET /metrics HTTP/1.0\r\nHost: {LOOPBACK}:{port}\r\n"
        f"Authorization: Bearer {secret.reveal()}\r\nConnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    try:
        writer.write(request.encode())
        answer = b""
        while len(answer) < METRICS_BYTES and (piece := await reader.read(65536)):
            answer += piece
        return answer.decode(errors="replace")
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
