"""The rules of tests/support/lane.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TEST = """
import pathlib
def test_it():
    runs = pathlib.Path({runs!r})
    seen = len(runs.read_text()) if runs.exists() else 0
    runs.write_text("." * (seen + 1))
    assert seen not in {failing!r}
def test_other():
    pass
"""


def lane(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    root = Path(__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-m", "tests.support.lane", "-q", "-p", "no:cacheprovider", *words],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("failing", "code", "runs"),
    [((), 0, 1), ((0,), 0, 4), ((0, 3), 1, 4), ((0, 1), 1, 2)],
    ids=["never", "once", "alone at last", "always"],
)
def test_what_failed_has_to_pass_alone_three_times(
    tmp_path: Path, failing: tuple[int, ...], code: int, runs: int
) -> None:
    (tmp_path / "test_it.py").write_text(TEST.format(runs=str(tmp_path / "runs"), failing=failing))
    done = lane(tmp_path, "test_it.py")
    assert done.returncode == code, done.stdout + done.stderr
    assert len((tmp_path / "runs").read_text()) == runs
    assert ("UNSTEADY test_it.py::test_it:" in done.stdout) == (failing == (0,))


def test_many_that_fail_are_no_accident(tmp_path: Path) -> None:
    many = "\n".join(f"def test_{number}():\n    assert False" for number in range(11))
    (tmp_path / "test_it.py").write_text(many)
    done = lane(tmp_path, "test_it.py")
    assert done.returncode == 1
    assert "alone" not in done.stdout


def test_other_ends_are_pytests(tmp_path: Path) -> None:
    assert lane(tmp_path, "missing.py").returncode == pytest.ExitCode.USAGE_ERROR
