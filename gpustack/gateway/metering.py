"""Token counts, read from an engine's answer as its bytes go by."""

import json
import re
from typing import Final, NamedTuple

import msgspec

from gpustack.lib.decode import UNREADABLE

_KEY: Final = b'"usage"'
_EVENT_END: Final = re.compile(rb"\r?\n\r?\n|\r\r")
_ENDS: Final = (b"\n\n", b"\r\n\r\n")
_USAGE_OBJECT: Final = re.compile(rb'"usage"\s*:\s*(?=\{)')
_HELD_BYTES: Final = 1024 * 1024  # of one event; a larger one is no usage event
_WHOLE_BYTES: Final = 64 * 1024  # of an answer that is read as a whole
_EDGE_BYTES: Final = 4096  # of a larger one, at each end, and of a stream's tail


class Tokens(NamedTuple):
    """What a request cost.

    Attributes:
        estimated: no engine said so.
    """

    prompt: int
    completion: int
    estimated: bool = False


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None

    def tokens(self) -> Tokens:
        completion = self.completion_tokens or 0
        prompt = self.prompt_tokens
        if prompt is None:  # rerankers often say the total alone
            prompt = max(0, (self.total_tokens or 0) - completion)
        return Tokens(max(0, prompt), max(0, completion))


class _Chunk(msgspec.Struct):
    usage: _Usage | None = None
    choices: list[msgspec.Raw] | None = None


_chunk = msgspec.json.Decoder(_Chunk)


def _decode(raw: bytes) -> _Chunk | None:
    try:
        return _chunk.decode(raw)
    except UNREADABLE:
        return None


def _event_chunk(event: bytes) -> _Chunk | None:
    """What one server-sent event says, if it is one JSON object."""
    parts = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
    return _decode(parts[0]) if len(parts) == 1 else None


class Reader:
    """Reads the token counts of an answer and changes none of its bytes."""

    def feed(self, piece: bytes) -> bytes:
        """The bytes that go on to the client now."""
        return piece

    def rest(self) -> bytes:
        """The bytes that go on at the answer's end."""
        return b""

    def tokens(self) -> Tokens | None:
        """What the engine said; None if it said nothing."""
        return None

    def guess(self) -> int:
        """About how many tokens the answer has so far."""
        return 0


class WholeReader(Reader):
    """Of an answer that is one JSON object.

    Small ones are decoded; of large ones only the two ends are searched, so that a megabyte of
    embeddings is not parsed to find two numbers. `"usage"` cannot lie inside a string: there its
    quotes are escaped.
    """

    def __init__(self) -> None:
        self._pieces: list[bytes] | None = []
        self._first = b""
        self._last = b""
        self._size = 0

    def feed(self, piece: bytes) -> bytes:
        self._size += len(piece)
        if self._pieces is not None:
            self._pieces.append(piece)
            if self._size > _WHOLE_BYTES:
                whole = b"".join(self._pieces)
                self._pieces = None
                self._first, self._last = whole[:_EDGE_BYTES], whole[-_EDGE_BYTES:]
        else:
            self._last = (self._last + piece)[-_EDGE_BYTES:]
        return piece

    def tokens(self) -> Tokens | None:
        if self._pieces is not None:
            found = _decode(b"".join(self._pieces))
            return found.usage.tokens() if found is not None and found.usage else None
        return _search(self._last) or _search(self._first)

    def guess(self) -> int:
        return self._size // 4


def _search(edge: bytes) -> Tokens | None:
    for match in reversed(list(_USAGE_OBJECT.finditer(edge))):
        try:
            text = edge[match.end() :].decode(errors="replace")
            found, _ = json.JSONDecoder().raw_decode(text)
            return msgspec.convert(found, _Usage).tokens()
        except UNREADABLE:
            continue
    return None


class StreamReader(Reader):
    """Of a stream that the client asked to end with its usage."""

    def __init__(self) -> None:
        self._tail = b""
        self._events = 0

    def feed(self, piece: bytes) -> bytes:
        self._events += piece.count(b"data:")
        self._tail = (self._tail + piece)[-_EDGE_BYTES:]
        return piece

    def tokens(self) -> Tokens | None:
        for event in reversed(_EVENT_END.split(self._tail)):
            if _KEY in event:
                chunk = _event_chunk(event)
                if chunk is not None and chunk.usage is not None:
                    return chunk.usage.tokens()
        return None

    def guess(self) -> int:
        return self._events


class UsageFilter(Reader):
    """Of a stream whose usage event we asked for: takes that event out again.

    All other bytes go on as the engine wrote them, event by event: an event in several reads is
    held until it is whole.
    """

    def __init__(self) -> None:
        self._held = b""
        self._usage: _Usage | None = None
        self._events = 0

    def feed(self, piece: bytes) -> bytes:
        self._events += piece.count(b"data:")
        if not self._held and _KEY not in piece and piece.endswith(_ENDS):
            return piece
        piece = self._held + piece
        end = max(piece.rfind(b"\n\n") + 2, piece.rfind(b"\n\r\n") + 3)
        if end < 3:
            if len(piece) > _HELD_BYTES:
                self._held = b""
                return piece
            self._held = piece
            return b""
        whole, self._held = piece[:end], piece[end:]
        return self._without_usage(whole)

    def rest(self) -> bytes:
        held, self._held = self._held, b""
        return self._without_usage(held)

    def _without_usage(self, events: bytes) -> bytes:
        # vLLM writes "usage":null into every event once it is to send a usage event.
        if events.count(_KEY) == events.count(b'"usage":null') + events.count(b'"usage": null'):
            return events
        kept = []
        start = 0
        for match in _EVENT_END.finditer(events):
            if not self._is_usage(events[start : match.start()]):
                kept.append(events[start : match.end()])
            start = match.end()
        if start < len(events) and not self._is_usage(events[start:]):
            kept.append(events[start:])
        return b"".join(kept)

    def _is_usage(self, event: bytes) -> bool:
        if _KEY not in event:
            return False
        chunk = _event_chunk(event)
        if chunk is None or chunk.usage is None:
            return False
        self._usage = chunk.usage
        return chunk.choices == []

    def tokens(self) -> Tokens | None:
        return self._usage.tokens() if self._usage is not None else None

    def guess(self) -> int:
        return self._events
