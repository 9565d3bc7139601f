"""The thread between a role and its launcher: how it is told to start, to reload and to leave.

The launcher writes JSON lines to the role's standard input and keeps that pipe open. The first
line says how to start (`Boot`); later ones are orders. The pipe's end means that the launcher is
gone or has been replaced, however it died: the kernel tells us, no heartbeat is needed.
"""

import asyncio
import json
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from gpustack.lib import platform

STDIN = 0


class Leave(StrEnum):
    """Why a role should end."""

    STOP = "stop"  # the node stops: engines are stopped too
    ORPHANED = "orphaned"  # the launcher is gone or replaced, or we alone got SIGTERM


@dataclass(frozen=True)
class Boot:
    """What a launcher tells a role at its start.

    Attributes:
        settings: `Settings.to_json()`.
        sockets: name -> descriptor of a listening socket that this process inherited.
        extra: facts for this role alone.
    """

    settings: dict[str, Any]
    sockets: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls) -> "Boot":
        return cls(**platform.read_json_line(STDIN))

    def line(self) -> bytes:
        return json.dumps(self.__dict__).encode() + b"\n"

    def socket(self, name: str) -> socket.socket:
        return socket.socket(fileno=self.sockets[name])


async def leave(reload: Callable[[], None] | None = None) -> Leave:
    """Wait until this role should end, and say why; call `reload` at each such order."""
    loop = asyncio.get_running_loop()
    told: asyncio.Future[Leave] = loop.create_future()

    def tell(reason: Leave) -> None:
        if not told.done():
            told.set_result(reason)

    def readable() -> None:
        data = os.read(STDIN, 4096)
        for order in data.split():
            if order == b"stop":
                tell(Leave.STOP)
            elif order == b"reload" and reload:
                reload()
        if not data:
            loop.remove_reader(STDIN)  # level-triggered: it would be called for ever
            tell(Leave.ORPHANED)

    os.set_blocking(STDIN, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the launcher, which tells us
    loop.add_signal_handler(signal.SIGTERM, tell, Leave.ORPHANED)
    loop.add_reader(STDIN, readable)
    try:
        return await told
    finally:
        loop.remove_reader(STDIN)
