"""Usage on disk until the server has it: one file per life of a gateway process.

The file holds JSON lines, in the order things happened:

    {"start": record}              a request went to an engine
    {"end": record}                it is over; the record is what the server shall have
    {"batch": sequence, "to": n}   batch `sequence` is the ends before byte n of this file
    {"ack": sequence}              the server has it
    {"sequence": sequence}         first line of a compacted file: batches up to this one are done

A batch is written down before it is sent, so that whoever finds the file after a crash sends the
same records under the same number, and the server counts them once. The process holds the file's
lock; a file whose lock is free is left over.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

import msgspec

from gpustack.lib import platform
from gpustack.lib.decode import UNREADABLE
from gpustack.lib.secrets import new_secret

logger = logging.getLogger(__name__)

BATCH_RECORDS: Final = 1000
_SPOOL_NAME: Final = re.compile(r"[0-9a-f]{32}")
_COMPACT_BYTES: Final = 1024 * 1024
LIMIT_BYTES: Final = 64 * 1024 * 1024  # about 200,000 requests


class Record(msgspec.Struct, omit_defaults=True):
    """See schemas.usage.UsageRecord; a test holds the two together."""

    request_id: str
    model_id: int
    model: str
    operation: str
    started_at: float
    credential_id: int | None = None
    user_id: int | None = None
    instance_id: int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    status: int = 0
    estimated: bool = False
    cut: bool = False
    first_byte_ms: float | None = None
    total_ms: float | None = None


class _Line(msgspec.Struct, omit_defaults=True):
    start: Record | None = None
    end: Record | None = None
    batch: int | None = None
    to: int = 0
    ack: int | None = None
    sequence: int | None = None


class Batch(msgspec.Struct):
    """Body of POST /v2/usage: see schemas.usage.UsageBatch."""

    spool: str
    sequence: int
    records: list[Record]


_line = msgspec.json.Decoder(_Line)
_encoder = msgspec.json.Encoder()


class Spool:
    """A spool file that this process holds the lock of.

    Attributes:
        id: its name, and the server's key for the sequence of its batches.
        dropped: records lost because the file or its disk was full.
    """

    def __init__(self, path: Path, file: IO[bytes], *, limit_bytes: int = LIMIT_BYTES) -> None:
        self.id = path.name
        self.dropped = 0
        self._path = path
        self._file = file
        self._limit_bytes = limit_bytes
        self._failing = False  # the newest line could not be written
        self._size = os.fstat(file.fileno()).st_size
        self._open: dict[str, Record] = {}
        self._sequence = 0  # of the newest batch
        self._acked_to = 0  # every end before this byte is with the server
        self._batch_to = 0  # the newest batch's end; equal to `_acked_to` when it is acked

    @classmethod
    def create(cls, folder: Path, *, limit_bytes: int = LIMIT_BYTES) -> "Spool":
        """A new, empty spool."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / new_secret()
        return cls(path, _opened(path), limit_bytes=limit_bytes)

    @classmethod
    def left_over(cls, folder: Path) -> Iterator["Spool"]:
        """The spools in `folder` that no live process holds. Each is this process's now.

        Requests that were under way when it died end as cut.
        """
        if not folder.is_dir():
            return
        for path in sorted(folder.iterdir()):
            if not _SPOOL_NAME.fullmatch(path.name):
                continue
            try:
                found = cls._taken(path)
            except OSError as error:  # the others shall be sent all the same
                logger.warning("spool %s is not readable: %s", path, error)
                continue
            if found is not None:
                yield found

    @classmethod
    def _taken(cls, path: Path) -> "Spool | None":
        """The spool at `path`, recovered; None if it is gone or in a live process's hands."""
        try:
            file = path.open("rb+", buffering=0)
        except FileNotFoundError:
            return None
        # Between opening and locking its owner may have put another file in its place.
        if not platform.lock(file) or not _is_at(file, path):
            file.close()
            return None
        spool = cls(path, file)
        try:
            spool._recover()
        except OSError:
            file.close()
            raise
        return spool

    def _recover(self) -> None:
        known: dict[str, Record] = {}
        offset = 0
        self._file.seek(0)
        for raw in self._file.read().splitlines(keepends=True):
            offset += len(raw)
            line = _parsed(raw)
            if line.start is not None:
                known[line.start.request_id] = line.start
            elif line.end is not None:
                known.pop(line.end.request_id, None)
            elif line.batch is not None:
                self._sequence, self._batch_to = line.batch, line.to
            elif line.ack is not None:
                self._acked_to = self._batch_to
            elif line.sequence is not None:
                self._sequence = line.sequence
        lines = []
        if offset and not raw.endswith(b"\n"):
            lines.append(b"\n")  # the last line was cut by the crash
        for record in known.values():
            record.cut = record.estimated = True
            lines.append(_encoder.encode(_Line(end=record)) + b"\n")
        if not self._append(b"".join(lines)):
            raise OSError("there is no room to write down which requests were cut")

    # --- writing -------------------------------------------------------------------------

    def start(self, record: Record) -> None:
        """Note that a request is under way."""
        self._open[record.request_id] = record
        if self._size < self._limit_bytes:
            self._append(_encoder.encode(_Line(start=record)) + b"\n")

    def end(self, record: Record) -> None:
        """Note how a request ended."""
        self._open.pop(record.request_id, None)
        full = self._size >= self._limit_bytes
        if full or not self._append(_encoder.encode(_Line(end=record)) + b"\n"):
            self.dropped += 1

    def _append(self, raw: bytes) -> bool:
        """Whether `raw` is in the file now, whole; else none of it is."""
        if self._file.closed:  # a request that is broken off after the process's last words
            return False
        fd = self._file.fileno()
        try:
            os.lseek(fd, self._size, os.SEEK_SET)
            _write_all(fd, raw)
        except OSError as error:  # a full disk must not stop requests
            with suppress(OSError):
                os.ftruncate(fd, self._size)
            if not self._failing:
                logger.warning("usage is not written to %s: %s", self._path, error)
            self._failing = True
            return False
        self._failing = False
        self._size += len(raw)
        return True

    # --- sending -------------------------------------------------------------------------

    def next_batch(self) -> Batch | None:
        """What the server shall have next; the same again until `acked`. None: it has all.

        Raises:
            OSError: the batch cannot be written down, so it must not be sent.
        """
        if self._batch_to > self._acked_to:
            return Batch(self.id, self._sequence, self._ends(self._acked_to, self._batch_to)[0])
        records, to = self._ends(self._acked_to, self._size)
        if not records:
            return None
        if not self._append(_encoder.encode(_Line(batch=self._sequence + 1, to=to)) + b"\n"):
            raise OSError(f"{self._path} takes no more, so nothing of it can be sent")
        self._sequence += 1
        self._batch_to = to
        return Batch(self.id, self._sequence, records)

    def acked(self) -> None:
        """The server has the newest batch."""
        self._append(_encoder.encode(_Line(ack=self._sequence)) + b"\n")
        self._acked_to = self._batch_to
        if self._acked_to > _COMPACT_BYTES and self._acked_to * 2 > self._size:
            try:
                self._compact()
            except OSError as error:  # the file stays as it is
                logger.warning("%s is not made smaller: %s", self._path, error)

    def _ends(self, first: int, last: int) -> tuple[list[Record], int]:
        """The ends from byte `first` to `last`, a batch at most, and the byte after them."""
        records: list[Record] = []
        offset = first
        self._file.seek(first)
        while offset < last and len(records) < BATCH_RECORDS:
            # A line is about 300 bytes; more are read than a batch takes, never the whole file.
            raw = self._file.read(min(last - offset, 256 * 1024))
            for piece in raw.splitlines(keepends=True):
                if not piece.endswith(b"\n"):
                    break
                offset += len(piece)
                line = _parsed(piece)
                if line.end is not None:
                    records.append(line.end)
                    if len(records) == BATCH_RECORDS:
                        break
            else:
                continue
            if not raw.count(b"\n"):
                break
            self._file.seek(offset)
        return records, offset

    def _compact(self) -> None:
        """Leave out what the server has, in one step: a crash finds the old file or the new."""
        beside = self._path.with_name(f".{self._path.name}")
        beside.unlink(missing_ok=True)
        lines = [_encoder.encode(_Line(sequence=self._sequence))]
        lines += [_encoder.encode(_Line(start=record)) for record in self._open.values()]
        self._file.seek(self._acked_to)
        written = b"\n".join(lines) + b"\n" + self._file.read()
        file = _opened(beside)
        try:
            _write_all(file.fileno(), written)
            os.replace(beside, self._path)
        except OSError:
            file.close()
            beside.unlink(missing_ok=True)
            raise
        self._file.close()
        self._file = file
        self._size = len(written)
        self._acked_to = self._batch_to = 0

    def close(self) -> None:
        """Let go of the file; it goes away if the server has all that is in it."""
        with suppress(OSError):
            if not self._open and self.next_batch() is None:
                self._path.unlink(missing_ok=True)
        self._file.close()


def _opened(path: Path) -> IO[bytes]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    file = os.fdopen(fd, "rb+", buffering=0)
    platform.lock(file)
    return file


def _write_all(fd: int, raw: bytes) -> None:
    """Write all of `raw`: a nearly full disk takes a part of it without an error."""
    rest = memoryview(raw)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _parsed(raw: bytes) -> _Line:
    try:
        return _line.decode(raw)
    except UNREADABLE:
        return _Line()  # half a line at the end of a life that was cut short
