"""Whether what was written to a client has left this process."""

import asyncio
import select
from typing import Final

_GONE: Final = select.POLLERR | select.POLLHUP | select.POLLNVAL


def is_flushed(transport: asyncio.Transport | None) -> bool:
    """Whether the kernel has, or soon takes, all that was written to `transport`.

    The transport of a TLS connection counts only what it has not encrypted yet; what lies encrypted
    below it is there only while the kernel takes nothing.
    """
    if transport is None:
        return True
    if transport.get_write_buffer_size():
        return False
    sock = transport.get_extra_info("socket")
    if sock is None or sock.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLOUT)
    return any(event & (select.POLLOUT | _GONE) for _, event in poll.poll(0))
