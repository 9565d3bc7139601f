"""Streams over one connection: each behaves as a connection of its own."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

import pytest

from gpustack.forward.tunnel import FRAME_BYTES, WINDOW_BYTES, Tunnel
from tests.support.wait import eventually, settled


class End(asyncio.Protocol):
    """One end of a stream, or of a connection that is no tunnel."""

    def __init__(self, *, echo: bool = False) -> None:
        self.echo = echo
        self.got = bytearray()
        self.lost: list[Exception | None] = []
        self.waits = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.got += data
        if self.echo:
            self.transport.write(data)
        if data == b"fail":
            raise RuntimeError("a mistake")

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)

    def pause_writing(self) -> None:
        self.waits = True

    def resume_writing(self) -> None:
        self.waits = False


@dataclass
class Pair:
    gateway: Tunnel
    relay: Tunnel
    accepted: list[End] = field(default_factory=list)

    def open(self) -> End:
        end = End()
        self.gateway.open(end)
        return end

    async def stream(self) -> tuple[End, End]:
        """Both ends of a new stream."""
        number = len(self.accepted)
        here = self.open()

        async def there() -> bool:
            return len(self.accepted) > number

        await eventually(there, "the stream has come")
        return here, self.accepted[number]


@asynccontextmanager
async def pair(*, echo: bool = False, beat_s: float = 20.0) -> AsyncIterator[Pair]:
    loop = asyncio.get_running_loop()
    accepted: list[End] = []

    def accept() -> End:
        accepted.append(End(echo=echo))
        return accepted[-1]

    arrived: asyncio.Future[Tunnel] = loop.create_future()

    def arrive() -> Tunnel:
        tunnel = Tunnel(beat_s=beat_s, silence_s=3 * beat_s)
        arrived.set_result(tunnel)
        return tunnel

    server = await loop.create_server(arrive, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    relay = Tunnel(accept=accept, beat_s=beat_s, silence_s=3 * beat_s)
    await loop.create_connection(lambda: relay, "127.0.0.1", port)
    gateway = await arrived
    await settled()
    try:
        yield Pair(gateway, relay, accepted)
    finally:
        gateway.abort()
        relay.abort()
        server.close()
        await settled()


async def has(end: End, size: int) -> None:
    async def enough() -> bool:
        return len(end.got) >= size

    await eventually(enough, f"{size} bytes; there are {len(end.got)}")


async def is_lost(end: End) -> Exception | None:
    async def lost() -> bool:
        return bool(end.lost)

    await eventually(lost, "the stream's end")
    assert len(end.lost) == 1
    return end.lost[0]


async def test_streams_carry_their_own_bytes_in_order() -> None:
    async with pair(echo=True) as both:
        ends = [both.open() for _ in range(20)]
        sent = [bytes([number]) * (number * 40_000 + 1) for number in range(20)]
        for end, data in zip(ends, sent, strict=True):
            for at in range(0, len(data), 7_001):
                end.transport.write(data[at : at + 7_001])
        for end, data in zip(ends, sent, strict=True):
            await has(end, len(data))
            assert end.got == data


async def test_a_slow_reader_makes_its_writer_wait_and_nobody_else() -> None:
    async with pair() as both:
        slow, slow_there = await both.stream()
        other, other_there = await both.stream()
        slow_there.transport.pause_reading()
        data = bytes(range(256)) * (WINDOW_BYTES // 64)  # four windows
        slow.transport.write(data)
        assert slow.waits
        other.transport.write(data)
        await has(other_there, len(data))
        assert not slow_there.got
        # One window lies at the reader's end, all else where it was written.
        assert slow.transport.get_write_buffer_size() == len(data) - WINDOW_BYTES
        slow_there.transport.resume_reading()
        await has(slow_there, len(data))
        assert slow_there.got == data
        assert not slow.waits


async def test_a_connection_that_takes_nothing_makes_every_writer_wait_until_it_does() -> None:
    loop, other = asyncio.get_running_loop(), End()
    server = await loop.create_server(lambda: other, "127.0.0.1", 0)
    tunnel = Tunnel()
    await loop.create_connection(lambda: tunnel, *server.sockets[0].getsockname())
    await eventually(lambda: there(other), "the connection")
    other.transport.pause_reading()
    ends = [End() for _ in range(100)]
    for end in ends:
        tunnel.open(end)
    for _ in range(2):
        for end in ends:
            end.transport.write(b"x" * (WINDOW_BYTES // 2))
        await settled()
    waiting = [end for end in ends if end.waits]
    assert waiting
    assert sum(end.transport.get_write_buffer_size() for end in ends) > 0
    other.transport.resume_reading()

    async def all_sent() -> bool:
        return not any(end.transport.get_write_buffer_size() for end in ends)

    await eventually(all_sent, "every writer's turn")
    assert not any(end.waits for end in ends)
    await has(other, len(ends) * WINDOW_BYTES)
    tunnel.abort()
    await is_lost(other)
    server.close()
    await settled()


async def there(end: End) -> bool:
    return hasattr(end, "transport")


async def test_a_close_comes_after_what_was_written_and_closes_both_ways() -> None:
    async with pair() as both:
        here, there = await both.stream()
        there.transport.pause_reading()
        data = b"x" * (2 * WINDOW_BYTES)
        here.transport.write(data)
        here.transport.close()
        await settled()
        assert not here.lost
        there.transport.resume_reading()
        assert await is_lost(there) is None
        assert there.got == data
        assert await is_lost(here) is None
        there.transport.write(b"too late")  # into nothing


async def test_an_abort_is_a_reset_at_the_other_end_and_ends_one_stream() -> None:
    async with pair() as both:
        here, there = await both.stream()
        other, other_there = await both.stream()
        here.transport.abort()
        assert isinstance(await is_lost(there), ConnectionResetError)
        other.transport.write(b"on")
        await has(other_there, 2)


async def test_a_protocols_mistake_ends_its_own_stream() -> None:
    async with pair() as both:
        here, there = await both.stream()
        other, other_there = await both.stream()
        here.transport.write(b"fail")
        await is_lost(there)
        await is_lost(here)
        other.transport.write(b"on")
        await has(other_there, 2)


async def test_the_tunnels_end_ends_every_stream() -> None:
    async with pair() as both:
        ends = [each for _ in range(3) for each in await both.stream()]
        both.gateway.abort()
        for end in ends:
            assert await is_lost(end) is not None
        assert both.gateway.over
        with pytest.raises(ConnectionRefusedError):
            both.open()


async def test_a_relay_that_leaves_finishes_its_streams_and_gets_no_new_ones() -> None:
    async with pair() as both:
        here, there = await both.stream()
        both.relay.leave()
        async with asyncio.timeout(10):
            await both.relay.left.wait()
        assert both.gateway.leaving
        with pytest.raises(ConnectionRefusedError):
            both.open()
        here.transport.write(b"still")
        await has(there, 5)
        assert not both.relay.over
        there.transport.close()
        await is_lost(here)

        async def over() -> bool:
            return both.relay.over and both.gateway.over

        await eventually(over, "the tunnel's end")


async def test_a_gateway_that_leaves_says_so_and_serves_on() -> None:
    async with pair(echo=True) as both:
        both.gateway.leave()

        async def told() -> bool:
            return both.relay.leaving

        await eventually(told, "the relay looks for another")
        end = both.open()
        end.transport.write(b"one more")
        await has(end, 8)


async def test_both_ends_may_leave() -> None:
    """A worker that stops while a gateway is being replaced gets no more requests from it."""
    async with pair() as both:
        here, _ = await both.stream()
        both.gateway.leave()

        async def told() -> bool:
            return both.relay.leaving

        await eventually(told, "the relay looks for another")
        both.relay.leave()
        async with asyncio.timeout(10):
            await both.relay.left.wait()
        with pytest.raises(ConnectionRefusedError):
            both.open()
        here.transport.close()
        await is_lost(here)


async def test_an_idle_tunnel_lives_and_a_silent_one_is_given_up() -> None:
    async with pair(beat_s=0.05) as both:
        await asyncio.sleep(0.5)  # more than three times what a silent one would get
        assert both.gateway.usable
        assert not both.relay.over
    loop, silent = asyncio.get_running_loop(), End()
    server = await loop.create_server(lambda: silent, "127.0.0.1", 0)
    tunnel = Tunnel(beat_s=0.05, silence_s=0.2)
    await loop.create_connection(lambda: tunnel, *server.sockets[0].getsockname())
    await is_lost(silent)  # which says nothing
    assert tunnel.over
    server.close()
    await settled()


def frame(kind: int, number: int, payload: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack(">BII", kind, number, len(payload) if length is None else length) + payload


@pytest.mark.parametrize(
    "raw",
    [
        frame(1, 2),  # only a gateway opens streams
        frame(99, 1),
        frame(0, 0),
        frame(2, 1, length=FRAME_BYTES + 1),
        frame(7, 0) * 2,  # each would be answered, and nobody reads the answers
        frame(8, 0),  # to what nobody said
        frame(3, 1, b"xx"),
        frame(3, 1, struct.pack(">I", 1)),  # for what was never sent
        frame(2, 1, b"x" * FRAME_BYTES) * (WINDOW_BYTES // FRAME_BYTES + 1),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
async def test_a_relay_that_breaks_the_rules_loses_its_tunnel(raw: bytes) -> None:
    loop = asyncio.get_running_loop()
    tunnels: list[Tunnel] = []

    def arrive() -> Tunnel:
        tunnels.append(Tunnel())
        return tunnels[-1]

    server = await loop.create_server(arrive, "127.0.0.1", 0)
    stranger = End()
    await loop.create_connection(lambda: stranger, *server.sockets[0].getsockname())

    async def there() -> bool:
        return bool(tunnels) and tunnels[0].usable

    await eventually(there, "the tunnel")
    end = End()
    tunnels[0].open(end)
    end.transport.pause_reading()
    stranger.transport.write(raw)
    await is_lost(end)
    await is_lost(stranger)
    server.close()
    await settled()
