"""An engine's log: a file that the engine itself writes, so that it outlives its agent.

`<id>.log` is the present run's, `<id>.log.<n>` that of an earlier run: the higher n, the newer.
Beside each may lie `….cut`, what was cut from its beginning when it became too long, and
`….times`, when it was how long. Whoever changes these files does so on the agent's event loop and
without awaiting in between, so that its readers there see all of a change or nothing.
"""

import os
from contextlib import suppress
from pathlib import Path

from gpustack.lib.text import plain

#: Enough of the end of a log to hold the last lines that matter.
TAIL_BYTES = 8192
LAST_WORDS_CHARS = 1024


def serve_dir(log_dir: Path) -> Path:
    """Where the logs of all engines lie."""
    return log_dir / "serve"


def log_path(log_dir: Path, instance_id: int) -> Path:
    return serve_dir(log_dir) / f"{instance_id}.log"


def cut_path(path: Path) -> Path:
    """Where what was cut from a log lies: its last bytes before the log's first."""
    return path.with_name(path.name + ".cut")


def times_path(path: Path) -> Path:
    """Where it is noted when a log was how long."""
    return path.with_name(path.name + ".times")


def runs_before(path: Path) -> list[Path]:
    """The logs of the runs before that of `path`, the newest first."""
    names: list[str] = []
    with suppress(FileNotFoundError):
        names = os.listdir(path.parent)
    start = path.name + "."
    ends = [name[len(start) :] for name in names if name.startswith(start)]
    numbers = sorted((int(end) for end in ends if end.isdecimal()), reverse=True)
    return [path.with_name(f"{path.name}.{number}") for number in numbers]


def start_log(path: Path) -> int:
    """A descriptor for a new run's log; the log of the run before, if it said anything, stays.

    Opened for append, so that who truncates it later finds no hole of zeros in it.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _set_aside(path)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _set_aside(path: Path) -> None:
    older = [cut_path(path), times_path(path)]
    with suppress(FileNotFoundError):
        if path.stat().st_size or older[0].exists():
            last = next(iter(runs_before(path)), None)
            number = 1 + (int(last.suffix[1:]) if last else 0)
            before = path.with_name(f"{path.name}.{number}")
            for old, new in zip(older, (cut_path(before), times_path(before)), strict=True):
                with suppress(FileNotFoundError):
                    old.replace(new)
            path.replace(before)
    for old in older:  # of a log that somebody removed, or that says nothing
        old.unlink(missing_ok=True)


def tail(path: Path, size: int = TAIL_BYTES) -> str:
    """The last `size` bytes of a log, without control characters; "" where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            text = file.read(size).decode(errors="replace")
    except OSError:
        return ""
    return plain(text.replace("\r", "\n"))


def last_words(path: Path, *, secret: str = "") -> str:
    """The last lines of a log for a message: at most 1 KB, without control characters."""
    text = tail(path)
    if secret:
        text = text.replace(secret, "********")
    lines = [line.rstrip() for line in text.split("\n") if line.strip()]
    words: list[str] = []
    size = 0
    for line in reversed(lines):
        size += len(line.encode()) + 1
        if size > LAST_WORDS_CHARS and words:
            break
        words.append(line[-LAST_WORDS_CHARS:])
    return "\n".join(reversed(words))
