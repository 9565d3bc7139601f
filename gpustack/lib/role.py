"""The thread between a role and its launcher: how it is told to start, to reload and to leave.

The launcher writes JSON lines to the role's standard input and keeps that pipe open. The first
line says how to start (`Boot`); later ones are orders: `stop`, or `level` and a log level. The
pipe's end means that the launcher is gone or has been replaced, however it died: the kernel tells
us, no heartbeat is needed.
"""

import asyncio
import json
import logging
import os
import signal
import socket
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from gpustack.lib import platform

logger = logging.getLogger(__name__)

STDIN = 0


class Leave(StrEnum):
    """Why a role should end."""

    STOP = "stop"  # the node stops: engines are stopped too
    ORPHANED = "orphaned"  # the launcher is gone or has been replaced


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


async def leave() -> Leave:
    """Wait until this role should end, and say why. Carries out other orders meanwhile."""
    loop = asyncio.get_running_loop()
    told: asyncio.Future[Leave] = loop.create_future()

    def tell(reason: Leave) -> None:
        if not told.done():
            told.set_result(reason)

    def readable() -> None:
        data = os.read(STDIN, 4096)
        for order in data.decode().splitlines():
            match order.split():
                case ["stop"]:
                    tell(Leave.STOP)
                case ["level", level]:
                    logging.getLogger().setLevel(level)
                    logger.info("log level is now %s", level)
        if not data:
            loop.remove_reader(STDIN)  # level-triggered: it would be called for ever
            tell(Leave.ORPHANED)

    os.set_blocking(STDIN, False)
    # These reach the launcher too when they go to the whole group (Ctrl-C, `timeout`), and it
    # tells us what to do, in the right order. Handlers, since SIG_IGN would be inherited by what
    # we start.
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: None)
    loop.add_reader(STDIN, readable)
    try:
        return await told
    finally:
        loop.remove_reader(STDIN)
