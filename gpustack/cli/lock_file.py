"""`<data-dir>/lock`: one launcher per data directory, and what it says of itself.

The content is true only while somebody holds the lock: a launcher that was killed leaves its own
behind, and its pid may be anybody's by now.
"""

import json
import os
import time
from pathlib import Path
from typing import IO, Any

from gpustack.errors import SettingsError
from gpustack.lib import platform

#: How long a launcher that holds the lock may take until it has said who it is.
SILENT_S = 10.0
#: How long others may hold the lock only to look.
LOOK_S = 0.2


class AlreadyRuns(SettingsError):
    """A launcher holds the lock."""


class LockFile:
    """The lock, held until this process ends.

    Args:
        inherited: the descriptor that the launcher before us holds it with; None: there is none.

    Attributes:
        left_behind: an earlier life ended without a goodbye, or handed over to us; some of its
            roles may still be on their way out.

    Raises:
        AlreadyRuns: another launcher holds it; names its pid.
        SettingsError: a command that says what it is doing holds it.
    """

    def __init__(self, data_dir: Path, inherited: int | None) -> None:
        self.left_behind = inherited is not None
        if inherited is not None:
            os.set_inheritable(inherited, False)
            self._file: IO[bytes] = os.fdopen(inherited, "r+b", buffering=0)
            return
        fd = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        self._file = os.fdopen(fd, "r+b", buffering=0)
        held = _locked(self._file)
        content = self._file.read().strip()
        if not held:
            self._file.close()
            raise _held(data_dir, _parsed(content))
        if content:
            self.left_behind = True
            self.say({"pid": os.getpid()})  # at once: nobody may signal the pid that stood here

    def say(self, said: dict[str, Any]) -> None:
        """Replace the content in one write, never shorter: no reader sees the end of another."""
        self._file.seek(0)
        self._file.write(json.dumps(said).encode().ljust(os.fstat(self._file.fileno()).st_size))

    def release(self) -> None:
        """A clean end: the next start need not wait for our ports."""
        self._file.truncate(0)
        self._file.close()

    def hand_over(self) -> int:
        """Make the lock survive exec; answers its descriptor."""
        os.set_inheritable(self._file.fileno(), True)
        return self._file.fileno()


def _held(data_dir: Path, said: dict[str, Any]) -> SettingsError:
    pid = said.get("pid", "unknown")
    if "doing" in said:
        return SettingsError(
            f"`gpustack {said['doing']}` is at work on data directory {data_dir}: pid {pid}. "
            "Try again when it has ended"
        )
    return AlreadyRuns(
        f"gpustack already runs on data directory {data_dir}: pid {pid}. "
        "Stop it first, or give another --data-dir"
    )


def _locked(file: IO[bytes]) -> bool:
    """Take the lock; waits for those who have it for a moment, to see whether anybody does."""
    deadline = time.monotonic() + LOOK_S
    while not platform.lock(file):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def running_node(data_dir: Path) -> dict[str, Any] | None:
    """What the launcher that holds the lock says of itself; None: nobody holds it.

    Raises:
        OSError: the file may not be read.
        SettingsError: the holder has said nothing for `SILENT_S`.
    """
    said: dict[str, Any] = {}
    deadline = time.monotonic() + SILENT_S
    while time.monotonic() < deadline:
        try:
            with (data_dir / "lock").open("rb") as file:
                if platform.lock(file, shared=True):  # so that those who look do not see each other
                    return None
                said = _parsed(file.read())
        except FileNotFoundError:
            return None
        if "life" in said:
            return said
        time.sleep(0.02)
    if "doing" in said:
        raise _held(data_dir, said)
    raise SettingsError(f"the node on data directory {data_dir} is still starting; see its log")


def _parsed(content: bytes) -> dict[str, Any]:
    """The content as an object; an empty one while it is being written."""
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError):
        return {}
