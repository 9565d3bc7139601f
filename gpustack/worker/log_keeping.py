"""The room that engines' logs take: bounded in size, and in number once nobody runs them."""

import asyncio
import logging
import os
from collections.abc import Callable, Set
from pathlib import Path

from gpustack.worker.supervisor.engine_log import previous_path, serve_dir

logger = logging.getLogger(__name__)

#: Bytes of a log at which it is moved aside, and of what is kept of it then.
MAX_BYTES = 50 << 20
#: Logs kept of instances that this worker does not run any more: for post-mortems.
KEPT_FILES = 100
#: Seconds between two looks.
EVERY_S = 60.0

_PIECE = 1 << 20


async def keep_logs(
    log_dir: Path,
    wanted: Callable[[], Set[int]],
    *,
    max_bytes: int = MAX_BYTES,
    kept_files: int = KEPT_FILES,
    every_s: float = EVERY_S,
) -> None:
    """Look after the logs until cancelled.

    Args:
        wanted: the instances whose logs stay.
    """
    while True:
        folder, ids = serve_dir(log_dir), set(wanted())
        await asyncio.to_thread(cut_long, folder, max_bytes)
        await asyncio.to_thread(remove_oldest, folder, ids, kept_files)
        await asyncio.sleep(every_s)


def cut_long(folder: Path, max_bytes: int) -> None:
    """Move what is in logs of more than `max_bytes` to the log before, as far as that may hold it.

    The engine keeps its file and goes on at its beginning. What it writes between the last read
    and the cut is lost: a log that no one can be asked to reopen has no better way.
    """
    for path in folder.glob("*.log"):
        try:
            if path.stat().st_size > max_bytes:
                _cut(path, max_bytes)
        except OSError as error:
            logger.warning("cannot cut %s: %s", path, error.strerror)


def _cut(path: Path, max_bytes: int) -> None:
    before = previous_path(path)
    new = before.with_name(before.name + ".new")
    with path.open("r+b") as log:  # this file, also when a new run moves it aside meanwhile
        try:
            log.seek(-max_bytes, os.SEEK_END)
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as kept:
                while kept.tell() < 2 * max_bytes and (piece := log.read(_PIECE)):
                    kept.write(piece)
            new.replace(before)
        finally:
            new.unlink(missing_ok=True)
            os.ftruncate(log.fileno(), 0)  # also when the disk is full: then all the more


def remove_oldest(folder: Path, wanted: Set[int], kept_files: int) -> None:
    """Keep the newest `kept_files` logs of instances that are not in `wanted`."""
    found: list[tuple[float, Path]] = []
    try:
        for path in folder.iterdir():
            name = path.name.partition(".")[0]
            if not (name.isdecimal() and int(name) in wanted):
                found.append((path.stat().st_mtime, path))
        for _, path in sorted(found, reverse=True)[kept_files:]:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass  # no engine has been started yet, or one has just moved its log: next time
    except OSError as error:
        logger.warning("cannot remove old logs: %s", error)
