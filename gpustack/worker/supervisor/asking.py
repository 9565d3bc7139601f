"""Plain requests to an engine over loopback: 64 engines are asked all the time, so no client."""

import asyncio
import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpustack.lib.secrets import Secret
from gpustack.worker.ports import LOOPBACK


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine answered; `body` as far as it was wanted."""

    status: int
    body: bytes = b""


async def ask(
    port: int,
    path: str,
    secret: Secret,
    *,
    limit_s: float,
    method: str = "GET",
    body: Mapping[str, Any] | None = None,
    at_most: int = 0,
) -> Answer:
    """The answer to one request, with the engine's secret, on a connection of its own.

    It goes to the engine directly: no gateway sees it, so nobody's usage has it.

    Args:
        at_most: bytes of the answer to wait for; 0: its status is enough.

    Raises:
        TimeoutError: no answer within `limit_s` seconds.
        OSError: it cannot be connected to, or closed without an answer.
    """
    content = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
    kind = f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n" if body else ""
    # HTTP/1.0: no answer in chunks.
    head = (
        f"{method} {path} HTTP/1.0\r\nHost: {LOOPBACK}:{port}\r\n{kind}"
        f"Authorization: Bearer {secret.reveal()}\r\nConnection: close\r\n\r\n"
    )
    async with asyncio.timeout(limit_s):
        reader, writer = await asyncio.open_connection(LOOPBACK, port)
        try:
            writer.write(head.encode() + content)
            status = _status(await reader.readline())
            answer = b""
            if at_most:
                length = await _length(reader)
                wanted = at_most if length is None else min(length, at_most)
                while len(answer) < wanted and (piece := await reader.read(65536)):
                    answer += piece
        except ValueError as error:  # a line without an end
            raise ConnectionError("this is no HTTP") from error
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    return Answer(status, answer)


async def _length(reader: asyncio.StreamReader) -> int | None:
    """Read the head to its end; what it says of the body's length.

    Some servers keep the connection whatever they are asked: its end alone would never come.
    """
    length = None
    while (line := await reader.readline()).strip():
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            length = int(value)
    return length


def _status(line: bytes) -> int:
    words = line.split(maxsplit=2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        raise ConnectionError("no answer" if not line else "this is no HTTP")
    return int(words[1])
