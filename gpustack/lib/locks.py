"""One process at a time may act in a role: a successor waits for it, then ends it."""

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gpustack.lib.platform import lock, start_ticks

logger = logging.getLogger(__name__)

PATIENCE_S = 5.0
POLL_S = 0.02


@contextmanager
def take_over(path: Path, *, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Hold the lock `path` while inside. Blocks; call it before the event loop has work.

    A predecessor that was told to leave gets `patience_s`; then the pid named in the file is
    killed: it hangs, and two of a kind must not act at once.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(path, "a+", opener=_private) as file:  # Path.open takes no opener
        deadline = time.monotonic() + patience_s
        while not lock(file):
            if time.monotonic() > deadline:
                _kill_holder(path)
                deadline = time.monotonic() + patience_s
            time.sleep(POLL_S)
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _kill_holder(path: Path) -> None:
    text = path.read_text().strip()
    if text.isdigit() and start_ticks(int(text)) is not None:
        logger.warning("process %s still holds %s and is killed", text, path)
        with suppress(ProcessLookupError):
            os.kill(int(text), signal.SIGKILL)
