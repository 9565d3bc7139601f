"""Whether an engine answers. One plain request over loopback: 64 engines are asked all the time."""

import asyncio
import contextlib

from gpustack.lib.secrets import Secret
from gpustack.worker.ports import LOOPBACK


async def answers(port: int, path: str, secret: Secret, *, limit_s: float = 2.0) -> bool:
    """Whether GET `path` with the engine's secret answers 200 within `limit_s` seconds."""
    request = (
        f"GET {path} HTTP/1.1\r\nHost: {LOOPBACK}:{port}\r\n"
        f"Authorization: Bearer {secret.reveal()}\r\nConnection: close\r\n\r\n"
    )
    try:
        async with asyncio.timeout(limit_s):
            reader, writer = await asyncio.open_connection(LOOPBACK, port)
            try:
                writer.write(request.encode())
                status = await reader.readline()
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except (OSError, ValueError):  # refused, reset, timed out; a line without an end
        return False
    return status.startswith(b"HTTP/1.") and status.split(b" ", 2)[1:2] == [b"200"]
