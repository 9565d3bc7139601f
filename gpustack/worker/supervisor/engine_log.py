"""An engine's log: a file that the engine itself writes, so that it outlives its agent."""

import os
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


def previous_path(path: Path) -> Path:
    """Where the log of the run before lies."""
    return path.with_name(path.name + ".1")


def start_log(path: Path) -> int:
    """A descriptor for a new run's log; the log of the run before moves aside.

    Opened for append, so that who truncates it later finds no hole of zeros in it.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists():
        path.replace(previous_path(path))
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


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
