"""Running a vendor's tool: bounded in time and in what it prints, whatever the driver does."""

import contextlib
import os
import selectors
import shutil
import subprocess
import time
from typing import IO, Final

from gpustack.lib import platform

#: Seconds for everything that one vendor's detector runs.
LIMIT_S: Final = 10.0

#: Bytes that are read of what a tool prints, to each of its two outputs. `rocm-smi --json` of 16
#: cards comes to less than 100 KB.
LIMIT_BYTES: Final = 8 << 20

#: Seconds between two looks whether a tool that keeps its outputs open has ended.
_POLL_S: Final = 0.05


class ToolFailed(Exception):
    """A tool that is installed gave no answer that can be used. The sentence says which and why."""


class Tools:
    """The programs of this machine, for the looks of one detector, one after the other.

    A tool that does not die (its driver keeps it in the kernel) is not started a second time
    before it is gone.

    Args:
        limit_s: for all that is run in one look together.
    """

    def __init__(self, *, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._undead: list[subprocess.Popen[bytes]] = []
        self.begin()

    def begin(self) -> None:
        """A new look: its time starts now."""
        self._deadline = time.monotonic() + self._limit_s

    def has(self, name: str) -> bool:
        return shutil.which(name) is not None

    def run(self, name: str, *arguments: str) -> str:
        """What the tool prints. Blocks: never to be called on the event loop.

        Raises:
            ToolFailed: it is not there, cannot be run, hangs, never stops printing, or says that
                it failed.
        """
        command = " ".join([name, *arguments])
        if (path := shutil.which(name)) is None:
            raise ToolFailed(f"{name} is not installed")
        self._undead = [one for one in self._undead if one.poll() is None]
        if self._undead:
            raise ToolFailed(f"{command} is not run: one from before hangs and cannot be ended")
        try:
            process = subprocess.Popen(
                [path, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # A group of its own, so that what it starts is ended with it.
                start_new_session=True,
            )
        except OSError as error:
            raise ToolFailed(f"{command} cannot be run: {error.strerror or error}") from None
        try:
            out, err = self._read(process, command)
        finally:
            self._end(process)
        if process.returncode != 0:
            said = (err or out).decode(errors="replace").strip().splitlines()
            raise ToolFailed(
                f"{command} exited with {process.returncode}"
                + "".join(f": {line[:200]}" for line in said[-1:])
            )
        return out.decode(errors="replace")

    def _read(self, process: subprocess.Popen[bytes], command: str) -> tuple[bytes, bytes]:
        """What it printed until it ended; both outputs at once, for neither may fill up."""
        outputs = [output for output in (process.stdout, process.stderr) if output is not None]
        printed: dict[IO[bytes], bytearray] = {output: bytearray() for output in outputs}
        with selectors.DefaultSelector() as selector:
            for output in outputs:
                os.set_blocking(output.fileno(), False)
                selector.register(output, selectors.EVENT_READ, output)
            while True:
                # Asked before its outputs are read: what it printed before it ended is in them.
                ended = process.poll() is not None
                if time.monotonic() >= self._deadline and not ended:
                    raise ToolFailed(f"{command} did not end within {self._limit_s:g} s")
                for key, _ in selector.select(0 if ended else _POLL_S):
                    output = key.data
                    if not _take(output, printed[output]):
                        selector.unregister(output)
                    elif len(printed[output]) > LIMIT_BYTES:
                        raise ToolFailed(f"{command} printed more than {LIMIT_BYTES >> 20} MiB")
                if ended:
                    return bytes(printed[outputs[0]]), bytes(printed[outputs[1]])
                if not selector.get_map():
                    time.sleep(_POLL_S)  # it has closed its outputs and lives on

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Leave nothing of it behind: no process of its group, no zombie, no open pipe."""
        if process.poll() is None:  # once it is reaped, its number may be another's
            platform.kill_group(process.pid, force=True)
        for output in (process.stdout, process.stderr):
            if output is not None:
                output.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1.0)
        if process.poll() is None:
            self._undead.append(process)


def _take(output: IO[bytes], printed: bytearray) -> bool:
    """Add what there is to read now; false at its end."""
    while len(printed) <= LIMIT_BYTES:
        try:
            piece = os.read(output.fileno(), 1 << 16)
        except BlockingIOError:
            return True
        if not piece:
            return False
        printed += piece
    return True
