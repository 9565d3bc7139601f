"""What vendors' tools print, kept below recorded/, and programs that print it."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest

from gpustack.worker.detectors.tools import Tools

RECORDED = Path(__file__).parent / "recorded"


def recorded(name: str) -> str:
    return (RECORDED / name).read_text(encoding="utf-8")


class Machine:
    """A PATH with programs of our own before all others.

    Attributes:
        calls: command lines that were run, in order.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._bin = folder / "bin"
        self._bin.mkdir()
        self._log = folder / "calls"
        monkeypatch.setenv("PATH", f"{self._bin}{os.pathsep}{os.environ['PATH']}")

    @property
    def calls(self) -> list[str]:
        return self._log.read_text().splitlines() if self._log.exists() else []

    def install(self, name: str, answers: Mapping[str, str]) -> None:
        """A program that prints a recording, or a text, for these arguments and fails for others.

        Args:
            answers: by arguments; a name of a recording or a text. "*" is a pattern of the shell.
        """
        cases = []
        for number, (arguments, answer) in enumerate(answers.items()):
            if "\n" in answer or not (file := RECORDED / answer).is_file():
                file = self._bin.parent / f"{name}-{number}.txt"
                file.write_text(answer, encoding="utf-8")
            pattern = "*".join(shlex.quote(piece) for piece in arguments.split("*"))
            cases.append(f"  {pattern}) cat {shlex.quote(str(file))} ;;")
        script = [
            "#!/bin/sh",
            f'echo "{name} $*" >> {shlex.quote(str(self._log))}',
            'case "$*" in',
            *cases,
            '  *) echo "this argument is not known: $*" >&2; exit 2 ;;',
            "esac",
        ]
        program = self._bin / name
        program.write_text("\n".join(script) + "\n", encoding="utf-8")
        program.chmod(0o755)

    def remove(self, name: str) -> None:
        (self._bin / name).unlink()

    def tools(self) -> Tools:
        return Tools(limit_s=30)
