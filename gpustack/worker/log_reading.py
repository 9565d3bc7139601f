"""Reading logs of any size: piece by piece, from the end, or as they grow."""

import asyncio
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import BinaryIO

#: Bytes read at once. One piece is all that is ever held of a log.
PIECE = 64 * 1024

#: Seconds between two looks whether a followed log has grown.
FOLLOW_S = 0.2


async def log_offset(file: BinaryIO, lines: int | None) -> int:
    """Where the last `lines` lines begin; 0 for all of them (None).

    An unfinished last line counts as one.
    """
    if lines is None:
        return 0
    end = file.seek(0, os.SEEK_END)
    if lines == 0 or end == 0:
        return end
    position, wanted = end, lines
    file.seek(end - 1)
    if file.read(1) == b"\n":
        wanted += 1  # it ends the last line, it does not begin another
    while position > 0:
        size = min(PIECE, position)
        position -= size
        file.seek(position)
        piece = file.read(size)
        found = piece.count(b"\n")
        if found >= wanted:
            at = size
            for _ in range(wanted):
                at = piece.rindex(b"\n", 0, at)
            return position + at + 1
        wanted -= found
        await asyncio.sleep(0)  # others have their turn, however long the log is
    return 0


async def whole(file: BinaryIO, start: int) -> AsyncGenerator[bytes, None]:
    """From `start` to where the log ends now; what is added meanwhile is left out."""
    left = file.seek(0, os.SEEK_END) - start
    file.seek(start)
    while left > 0 and (piece := file.read(min(PIECE, left))):
        left -= len(piece)
        yield piece


async def followed(path: Path, file: BinaryIO, start: int) -> AsyncGenerator[bytes, None]:
    """From `start` on, until the log is removed: also what is added, and the next runs' logs.

    Args:
        path: where the log lies; another file there is the log of a new run.
        file: the open log.
    """
    opened: BinaryIO | None = None
    try:
        file.seek(start)
        while True:
            while piece := file.read(PIECE):
                yield piece
            there = _stat(path)
            if there is None and os.fstat(file.fileno()).st_nlink == 0:
                return  # removed, not moved aside for a new run
            if there is not None and there.st_ino != os.fstat(file.fileno()).st_ino:
                # Nothing was left in the old one, and who starts a new one has ended the old.
                if piece := file.read(PIECE):
                    yield piece
                    continue
                if opened is not None:
                    opened.close()
                file = opened = path.open("rb")
                continue
            if there is not None and there.st_size < file.tell():
                file.seek(0)  # it was cut in place
                continue
            await asyncio.sleep(FOLLOW_S)
    finally:
        if opened is not None:
            opened.close()


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None
