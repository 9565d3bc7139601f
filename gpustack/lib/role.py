"""The thread between a role and its launcher: how it is told to start, to reload and to leave.

The launcher writes JSON lines to the role's standard input and keeps that pipe open. The first
line says how to start (`Boot`); later ones are orders: `stop`, or `reload` and the settings that
may change while a role runs, as JSON. The pipe's end means that the launcher is gone or has been
replaced, however it died: the kernel tells us, no heartbeat is needed.
"""

import asyncio
import json
import logging
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from gpustack.lib import logs, platform

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


#: Called with what an order to reload brings: the settings that may change, by key, as JSON.
Reload = Callable[[dict[str, Any]], None]


async def leave(reload: Reload = lambda _: None) -> Leave:
    """Wait until this role should end, and say why. Carries out other orders meanwhile.

    Args:
        reload: takes new settings in. A new `debug` is taken in here, for every role.
    """
    loop = asyncio.get_running_loop()
    told: asyncio.Future[Leave] = loop.create_future()
    rest = b""

    def tell(reason: Leave) -> None:
        if not told.done():
            told.set_result(reason)

    def readable() -> None:
        nonlocal rest
        data = os.read(STDIN, 65536)
        *orders, rest = (rest + data).split(b"\n")
        for order in orders:
            word, _, told_with = order.partition(b" ")
            if word == b"stop":
                tell(Leave.STOP)
            elif word == b"reload":
                _take_in(json.loads(told_with), reload)
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


def _take_in(settings: dict[str, Any], reload: Reload) -> None:
    logs.set_level(debug=bool(settings.get("debug")))
    try:
        reload(settings)
    except Exception:  # a role that runs must not end because of a setting
        logger.exception("new settings were not taken in")
