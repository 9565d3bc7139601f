"""Reading logs of any size: piece by piece, from the end, from a time, or as they grow."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from gpustack.worker import log_times
from gpustack.worker.supervisor.engine_log import cut_path, runs_before

#: Bytes read at once. One piece is all that is ever held of a log.
PIECE = 64 * 1024

#: Seconds between two looks whether a followed log has grown.
FOLLOW_S = 0.2


class Run:
    """The log of one run, open: what was cut from it, and what its engine writes.

    Its bytes are known by their positions, which count from the run's beginning: cutting it moves
    none, nor does the start of the next run, which has the files called otherwise.

    Args:
        path: as `engine_log.log_path` has it, or one of `runs_before`.

    Raises:
        FileNotFoundError: there is no such log.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO = path.open("rb", buffering=0)
        self._inode = os.fstat(self._file.fileno()).st_ino
        self._cut: BinaryIO | None = None
        self._cut_mark: tuple[int, int] | None = None
        self._base = self._begins = log_times.read(path).base
        self._look_at_cut()

    def close(self) -> None:
        self._file.close()
        if self._cut is not None:
            self._cut.close()

    @property
    def begins(self) -> int:
        """Position of the first byte that is left."""
        self._look()
        return self._begins

    @property
    def ends(self) -> int:
        """Position behind the last byte."""
        self._look()
        return self._base + self._size()

    @property
    def removed(self) -> bool:
        return os.fstat(self._file.fileno()).st_nlink == 0

    def read(self, position: int, limit: int) -> tuple[int, bytes]:
        """Up to `limit` bytes from `position` on, and where they begin.

        That is further on when what was there has been cut away, and the log's beginning when
        somebody else has emptied it.
        """
        self._look()
        position = max(position, self._begins)
        if position < self._base and self._cut is not None:
            self._cut.seek(position - self._begins)
            return position, self._cut.read(min(limit, self._base - position))
        if position - self._base > self._size():
            position = self._base
        self._file.seek(position - self._base)
        return position, self._file.read(limit)

    def read_before(self, position: int) -> tuple[int, bytes]:
        """A piece that ends at `position`, and where it begins; empty at the log's beginning."""
        floor = self._base if self._base < position else self.begins
        begin = max(floor, position - PIECE)
        return self.read(begin, max(0, position - begin))

    def since(self, seconds: float) -> int:
        """Where the line begins that was being written `seconds` ago, or a little earlier.

        The beginning of what is left if nobody knows.
        """
        found = log_times.read(self._path).position(time.time() - seconds, self.ends)
        if found is None or found <= self.begins:
            return self.begins
        begin, piece = self.read_before(found)
        newline = piece.rfind(b"\n")
        return begin + newline + 1 if newline >= 0 else found

    def next(self, path: Path) -> "Run | None":
        """The log of the run after this one, of the instance whose log is at `path`."""
        self._look()
        if self._path == path and self._is_at(path):
            return None
        logs = [path, *runs_before(path)]
        after = logs.index(self._path) - 1 if self._path in logs else 0
        if after < 0:
            return None
        with suppress(FileNotFoundError):
            return Run(logs[after])
        return None

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _is_at(self, path: Path) -> bool:
        try:
            return path.stat().st_ino == self._inode
        except FileNotFoundError:
            return False

    def _look(self) -> None:
        """Keep up with who cuts the log, or calls it otherwise."""
        if not self._is_at(self._path):
            first = self._path.with_name(self._path.name.partition(".log")[0] + ".log")
            now = next((one for one in (first, *runs_before(first)) if self._is_at(one)), None)
            if now is None:
                return  # removed; what is open can still be read
            self._path = now
        self._look_at_cut()

    def _look_at_cut(self) -> None:
        try:
            found = cut_path(self._path).stat()
        except FileNotFoundError:
            mark = None
        else:
            mark = found.st_ino, found.st_mtime_ns
        if mark == self._cut_mark:
            return
        if self._cut is not None:
            self._cut.close()
        self._cut, self._cut_mark = None, mark
        self._base = self._begins = log_times.read(self._path).base
        with suppress(FileNotFoundError):  # an old log, which has just been removed
            if mark is not None:
                self._cut = cut_path(self._path).open("rb", buffering=0)
                self._begins = self._base - os.fstat(self._cut.fileno()).st_size


async def tail(run: Run, lines: int) -> int:
    """Where the last `lines` lines begin. An unfinished last line counts as one."""
    position, wanted = run.ends, lines
    if lines == 0:
        return position
    begin, piece = run.read_before(position)
    wanted += piece.endswith(b"\n")  # it ends the last line, it does not begin another
    while piece:
        found = piece.count(b"\n")
        if found >= wanted:
            at = len(piece)
            for _ in range(wanted):
                at = piece.rindex(b"\n", 0, at)
            return begin + at + 1
        wanted -= found
        await asyncio.sleep(0)  # others have their turn, however long the log is
        begin, piece = run.read_before(begin)
    return run.begins


async def whole(run: Run, position: int) -> AsyncGenerator[bytes, None]:
    """From `position` to where the log ends now; what is added meanwhile is left out."""
    end = run.ends
    while position < end:
        position, piece = run.read(position, min(PIECE, end - position))
        if not piece:
            return
        position += len(piece)
        yield piece


async def followed(
    path: Path, run: Run, position: int, wanted: Callable[[], bool]
) -> AsyncGenerator[bytes, None]:
    """From `position` on: also what is added, and the next runs' logs, until there will be no more.

    Args:
        path: where the log of the present run lies.
        wanted: whether the instance may still say something.
    """
    opened: Run | None = None
    try:
        while True:
            may_grow = wanted()
            while True:
                position, piece = run.read(position, PIECE)
                if not piece:
                    break
                position += len(piece)
                yield piece
            # Nothing is left in this one, and who starts a new run has ended the one before.
            if (after := run.next(path)) is not None:
                if opened is not None:
                    opened.close()
                run = opened = after
                position = run.begins
            elif run.removed or not may_grow:
                return
            else:
                await asyncio.sleep(FOLLOW_S)
    finally:
        if opened is not None:
            opened.close()
