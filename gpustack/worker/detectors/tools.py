"""Running a vendor's tool: bounded in time, whatever the driver does."""

import shutil
import subprocess
import time
from typing import Final

#: Seconds for everything that one vendor's detector runs.
LIMIT_S: Final = 10.0


class ToolFailed(Exception):
    """A tool that is installed gave no answer that can be used. The sentence says which and why."""


class Tools:
    """The programs of this machine, for one look of one detector.

    Args:
        limit_s: for all that is run through it together.
    """

    def __init__(self, *, limit_s: float = LIMIT_S) -> None:
        self._deadline = time.monotonic() + limit_s
        self._limit_s = limit_s

    def has(self, name: str) -> bool:
        return shutil.which(name) is not None

    def run(self, name: str, *arguments: str) -> str:
        """What the tool prints. Blocks: never to be called on the event loop.

        Raises:
            ToolFailed: it is not there, cannot be run, hangs, or says that it failed.
        """
        command = " ".join([name, *arguments])
        if (path := shutil.which(name)) is None:
            raise ToolFailed(f"{name} is not installed")
        try:
            done = subprocess.run(
                [path, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=max(self._deadline - time.monotonic(), 0.0),
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ToolFailed(f"{command} did not end within {self._limit_s:g} s") from None
        except OSError as error:
            raise ToolFailed(f"{command} cannot be run: {error.strerror or error}") from None
        if done.returncode != 0:
            said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
            raise ToolFailed(
                f"{command} exited with {done.returncode}"
                + "".join(f": {line[:200]}" for line in said[-1:])
            )
        return done.stdout.decode(errors="replace")
