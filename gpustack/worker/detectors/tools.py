"""Running a vendor's tool: bounded in time and in what it prints, whatever the driver does."""

import contextlib
import os
import selectors
import shutil
import subprocess
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import IO, Final

from gpustack.lib import platform

#: Seconds for everything that one vendor's detector runs.
LIMIT_S: Final = 10.0

#: Bytes that are read of what a tool prints, to each of its two outputs. Vendors' JSON for 16 cards
#: comes to less than 100 KB. Reading more than 1 MB of JSON holds up the event loop for longer than
#: 50 ms, since no other thread runs meanwhile.
LIMIT_BYTES: Final = 512 << 10

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
        mark: variables that all that is run carries, so that what a killed agent left is found.
    """

    def __init__(
        self, *, limit_s: float = LIMIT_S, mark: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self._limit_s = limit_s
        self._mark = mark
        self._undead: list[subprocess.Popen[bytes]] = []
        self._running: subprocess.Popen[bytes] | None = None
        self._staying: subprocess.Popen[bytes] | None = None
        self._is_closed = False
        self.begin()

    def begin(self) -> None:
        """A new look: its time starts now."""
        self._deadline = time.monotonic() + self._limit_s

    def close(self) -> None:
        """End what runs, and the program that stays; there is no look after this.

        For the event loop, while a look may hang in its thread.
        """
        self._is_closed = True
        running = self._running
        if running is not None and running.poll() is None:
            platform.kill_group(running.pid, force=True)
        self._let_go()

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
        try:
            process = self._start([path, *arguments], subprocess.DEVNULL, subprocess.PIPE)
            self._running = process
            try:
                out, err = self._read(process)
            finally:
                self._running = None
                self._end(process)
        except ToolFailed as error:
            raise ToolFailed(f"{command} {error}") from None
        if process.returncode != 0:
            said = (err or out).decode(errors="replace").strip().splitlines()
            raise ToolFailed(
                f"{command} exited with {process.returncode}"
                + "".join(f": {line[:200]}" for line in said[-1:])
            )
        return out.decode(errors="replace")

    def ask(self, *argv: str) -> str:
        """The line that a program of ours prints for each line that it is sent. Blocks.

        It stays, from the first question to the last: there is one such program to a detector. It
        is started anew after it has ended, and ends with this process, since its input does.

        Raises:
            ToolFailed: it cannot be run, has ended, hangs or never stops printing. It is ended
                then; the sentence begins with what it did.
        """
        if self._staying is None:
            self._staying = self._start(list(argv), subprocess.PIPE, subprocess.DEVNULL)
        try:
            return self._line_of(self._staying)
        except ToolFailed:
            self._let_go()
            raise

    def _let_go(self) -> None:
        """End the program that stays, if there is one."""
        if (process := self._staying) is not None:
            self._staying = None
            self._end(process)

    def _start(self, argv: list[str], stdin: int, stderr: int) -> subprocess.Popen[bytes]:
        self._undead = [one for one in self._undead if one.poll() is None]
        if self._is_closed:
            raise ToolFailed("is not run: this agent leaves")
        if self._undead:
            raise ToolFailed("is not run: one from before hangs and cannot be ended")
        try:
            return subprocess.Popen(
                argv,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**_environment(), **self._mark},
                # A group of its own, so that what it starts is ended with it.
                start_new_session=True,
            )
        except OSError as error:
            raise ToolFailed(f"cannot be run: {error.strerror or error}") from None

    def _line_of(self, process: subprocess.Popen[bytes]) -> str:
        printed = bytearray()
        question, answer = process.stdin, process.stdout
        if question is None or answer is None:
            raise ValueError("a program that stays has pipes")
        with contextlib.suppress(BrokenPipeError):  # it has ended: what it printed says why
            question.write(b"\n")
            question.flush()
        os.set_blocking(answer.fileno(), False)
        with selectors.DefaultSelector() as selector:
            selector.register(answer, selectors.EVENT_READ)
            while not printed.endswith(b"\n"):
                if (left_s := self._deadline - time.monotonic()) <= 0:
                    raise ToolFailed(f"has not answered within {self._limit_s:g} s")
                if selector.select(left_s) and not _take(answer, printed):
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=1.0)
                    raise ToolFailed(_ended(process.poll()))
                if len(printed) > LIMIT_BYTES:
                    raise ToolFailed(f"printed more than {LIMIT_BYTES >> 10} KiB")
        return printed.decode(errors="replace")

    def _read(self, process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
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
                    raise ToolFailed(f"did not end within {self._limit_s:g} s")
                for key, _ in selector.select(0 if ended else _POLL_S):
                    output = key.data
                    if not _take(output, printed[output]):
                        selector.unregister(output)
                    elif len(printed[output]) > LIMIT_BYTES:
                        raise ToolFailed(f"printed more than {LIMIT_BYTES >> 10} KiB")
                if ended:
                    return bytes(printed[outputs[0]]), bytes(printed[outputs[1]])
                if not selector.get_map():  # it has closed its outputs: most often its end
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=_POLL_S)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Leave nothing of it behind: no process of its group, no zombie, no open pipe."""
        if process.poll() is None:  # once it is reaped, its number may be another's
            platform.kill_group(process.pid, force=True)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1.0)
        if process.poll() is None:
            self._undead.append(process)


def _environment() -> dict[str, str]:
    """Ours without our settings, secrets among them; and in English, as parsers want it."""
    kept = {name: each for name, each in os.environ.items() if not name.startswith("GPUSTACK_")}
    return kept | {"LC_ALL": "C.UTF-8"}


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by signal {-code}"
    return "has ended" if code is None else f"exited with {code}"


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
