"""When a log was how long: what `since` goes by, whatever engines write.

A file of lines beside the log: a time and a position. Positions count the bytes of the whole run,
so they stay right when the log's beginning is cut away; `=position` says that the log's file begins
there now. Times are this machine's, and only ever compared with each other.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from gpustack.lib import platform
from gpustack.worker.supervisor.engine_log import times_path

#: Bytes of the file, some 1300 lines, at which half of the older half of its lines goes. So it
#: covers the whole run, the more exactly the nearer to now.
LIMIT_BYTES = 32 << 10


@dataclass(frozen=True, slots=True)
class Times:
    """What is noted of one log.

    Attributes:
        base: position of the first byte in the log's file.
        samples: (time, position): what lies behind the position was written after the time.
    """

    base: int = 0
    samples: tuple[tuple[float, int], ...] = ()

    def position(self, at: float, end: int) -> int | None:
        """Behind it lies all that was written after `at`, in a log that ends at `end`.

        None: nobody knows such a place but the log's beginning. A clock that was set back makes it
        lie too early, never too late.
        """
        for time, position in reversed(self.samples):
            if time <= at:
                return position if position <= end else None
        return None


def read(path: Path) -> Times:
    """What is noted of the log at `path`; a line that is no use is left out."""
    base, samples = 0, []
    for line in _lines(path):
        time, _, position = line.partition(" ")
        try:
            sample = float(time), int(position.removeprefix("="))
        except ValueError:
            continue  # the disk was full, or the machine lost its power
        samples.append(sample)
        if position.startswith("="):
            base = sample[1]
    return Times(base, tuple(samples))


def note(path: Path, now: float, position: int, *, begins: bool = False) -> None:
    """Note that the log at `path` ends at `position` at `now`.

    Args:
        begins: it is emptied with this; its file begins there.

    Raises:
        OSError: the disk is full, for example.
    """
    mark = "=" if begins else ""
    file = os.open(times_path(path), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(file, f"{now:.1f} {mark}{position}\n".encode())
        is_long = os.fstat(file).st_size > LIMIT_BYTES
    finally:
        os.close(file)
    if is_long:
        platform.write_private(times_path(path), "\n".join(_thinned(_lines(path))) + "\n")


def _thinned(lines: list[str]) -> list[str]:
    half = len(lines) // 2
    base = next((line for line in reversed(lines) if "=" in line), None)
    older = [line for line in lines[:half:2] if line != base]
    return [*([base] if base in lines[:half] and base else []), *older, *lines[half:]]


def _lines(path: Path) -> list[str]:
    try:
        return times_path(path).read_text("ascii", errors="replace").split("\n")[:-1]
    except OSError:  # none yet, in most cases
        return []
