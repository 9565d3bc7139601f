"""The room that engines' logs take: bounded in size and in number. And when they were how long."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gpustack.worker import log_times
from gpustack.worker.supervisor.engine_log import (
    cut_path,
    log_path,
    runs_before,
    serve_dir,
    times_path,
)

logger = logging.getLogger(__name__)

_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is kept of logs.

    Attributes:
        log_bytes: of a log at which its file is emptied; what is kept of it then is at most twice
            that, so nothing is dropped of one that grows by less between two looks.
        runs: of an instance, before the present one. At one start in five minutes, the slowest
            that a crash loop gets, they reach back a night.
        runs_bytes: of the same together, whatever the newest of them has.
        gone: instances that this worker does not run any more.
        gone_bytes: of the same together.
        look_s: seconds between two looks at what is being written.
        sweep_s: between two looks at what is kept.
    """

    log_bytes: int = 50 << 20
    runs: int = 100
    runs_bytes: int = 50 << 20
    gone: int = 100
    gone_bytes: int = 1 << 30
    look_s: float = 2.0
    sweep_s: float = 60.0


async def keep_logs(
    log_dir: Path, wanted: Callable[[], Set[int]], bounds: Bounds | None = None
) -> None:
    """Look after the logs until cancelled.

    Args:
        wanted: the instances whose logs stay.
    """
    bounds = bounds or Bounds()
    watches: dict[int, Watch] = {}
    swept = float("-inf")
    while True:
        ids = set(wanted())
        for gone in watches.keys() - ids:
            del watches[gone]
        for id in ids:
            watch = watches.setdefault(id, Watch(log_path(log_dir, id)))
            try:
                await watch.look(bounds.log_bytes)
            except OSError as error:
                watch.complain(error)
        if time.monotonic() - swept >= bounds.sweep_s:
            await asyncio.to_thread(sweep, serve_dir(log_dir), ids, bounds)
            swept = time.monotonic()
        await asyncio.sleep(bounds.look_s)


class Watch:
    """Sees how the log of one instance's present run grows, and cuts it when it is too long."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = 0
        self._base = self._size = 0
        self._said = ""

    async def look(self, log_bytes: int) -> None:
        """Note how long the log is, if that is news.

        Raises:
            OSError: that cannot be written down, or the log cannot be cut.
        """
        try:
            now = self._path.stat()
        except FileNotFoundError:
            return
        if now.st_ino != self._inode:  # a new run, or a new agent
            self._inode, self._base = now.st_ino, log_times.read(self._path).base
            self._size = 0
        elif now.st_size < self._size:  # somebody else has emptied it
            self._forget()
        try:
            if now.st_size != self._size:
                self._size = now.st_size
                log_times.note(self._path, time.time(), self._base + now.st_size)
        finally:  # also when the disk is full: then all the more
            if now.st_size > log_bytes:
                await self._cut(now.st_size, log_bytes)

    def complain(self, error: OSError) -> None:
        """Say so once, not every two seconds."""
        if error.strerror and error.strerror != self._said:
            self._said = error.strerror
            logger.warning("the log %s cannot be looked after: %s", self._path, error.strerror)

    async def _cut(self, size: int, log_bytes: int) -> None:
        """Move what is in the log to what was cut from it before, as far as that may hold it.

        The engine keeps its file and goes on at its beginning. What it writes between the last
        read and the cut is lost: a log that no one can be asked to reopen has no better way. So is
        all of it when the disk is full.
        """
        new = cut_path(self._path).with_name(self._path.name + ".cut.new")
        with self._path.open("r+b") as log:
            log.seek(max(0, size - 2 * log_bytes))
            try:
                with _created(new) as kept:
                    await asyncio.to_thread(_copy, log.fileno(), kept.fileno(), 2 * log_bytes)
                    # From here on nothing is awaited: see engine_log. A piece or two are left.
                    _copy(log.fileno(), kept.fileno(), 4 * _PIECE)
                if self._is_present(log.fileno()):
                    self._base += os.lseek(log.fileno(), 0, os.SEEK_CUR)
                    log_times.note(self._path, time.time(), self._base, begins=True)
                    new.replace(cut_path(self._path))
                    self._emptied(log.fileno())
            except OSError:
                if self._is_present(log.fileno()):
                    self._forget()
                    self._emptied(log.fileno())
                raise
            finally:
                new.unlink(missing_ok=True)

    def _is_present(self, log: int) -> bool:
        """Whether it is the log of the present run still, and not moved aside meanwhile."""
        with suppress(FileNotFoundError):
            return os.fstat(log).st_ino == self._path.stat().st_ino
        return False

    def _emptied(self, log: int) -> None:
        os.ftruncate(log, 0)
        self._size = 0

    def _forget(self) -> None:
        """What is noted of the log is of bytes that are not there any more."""
        for beside in (cut_path(self._path), times_path(self._path)):
            with suppress(OSError):
                beside.unlink(missing_ok=True)
        self._base = self._size = 0


def _created(path: Path) -> BinaryIO:
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")


def _copy(source: int, target: int, limit: int) -> None:
    """At most `limit` bytes, from where `source` stands to its end."""
    copied = 0
    while copied < limit and (piece := os.read(source, min(_PIECE, limit - copied))):
        left = memoryview(piece)
        while left:
            left = left[os.write(target, left) :]
        copied += len(piece)


def sweep(folder: Path, wanted: Set[int], bounds: Bounds) -> None:
    """Remove what is beyond `bounds` of earlier runs, and of instances that are not wanted."""
    gone: dict[str, list[tuple[float, int, Path]]] = {}
    try:
        for path in folder.iterdir():
            name = path.name.partition(".")[0]
            if not (name.isdecimal() and int(name) in wanted):
                found = path.stat()
                gone.setdefault(name, []).append((found.st_mtime, found.st_size, path))
        for id in wanted:
            _remove_old_runs(folder / f"{id}.log", bounds)
        newest = sorted(gone.values(), key=lambda files: max(time for time, _, _ in files))
        kept_bytes = 0
        for number, files in enumerate(reversed(newest), 1):
            kept_bytes += sum(size for _, size, _ in files)
            if number > bounds.gone or kept_bytes > bounds.gone_bytes:
                for _, _, path in files:
                    path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass  # no engine has been started yet, or one has just moved its log: next time
    except OSError as error:
        logger.warning("cannot remove old logs: %s", error)


def _remove_old_runs(path: Path, bounds: Bounds) -> None:
    kept_bytes = 0
    for number, run in enumerate(runs_before(path), 1):
        files = [run, cut_path(run), times_path(run)]
        for file in files:
            with suppress(FileNotFoundError):
                kept_bytes += file.stat().st_size
        if number > bounds.runs or (number > 1 and kept_bytes > bounds.runs_bytes):
            for file in files:
                file.unlink(missing_ok=True)
