import os
from pathlib import Path

from gpustack.worker.supervisor.engine_log import (
    cut_path,
    last_words,
    log_path,
    runs_before,
    start_log,
    times_path,
)


def test_a_new_run_keeps_the_logs_of_the_runs_before(tmp_path: Path) -> None:
    path = log_path(tmp_path, 3)
    for run in range(12):
        fd = start_log(path)
        os.write(fd, str(run).encode())
        os.close(fd)
        cut_path(path).write_text(f"cut {run}")
        times_path(path).write_text(f"{run} {run}")
    assert path.read_text() == "11"
    before = runs_before(path)
    assert [run.read_text() for run in before] == [str(run) for run in reversed(range(11))]
    assert cut_path(before[0]).read_text() == "cut 10"
    assert times_path(before[-1]).read_text() == "0 0"
    assert runs_before(log_path(tmp_path, 4)) == []
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_run_that_said_nothing_leaves_no_log(tmp_path: Path) -> None:
    path = log_path(tmp_path, 3)
    for said in (b"one", b"", b"", b"two"):
        fd = start_log(path)
        os.write(fd, said)
        os.close(fd)
    assert [run.read_bytes() for run in runs_before(path)] == [b"one"]
    path.unlink()
    cut_path(path).touch()
    os.close(start_log(path))
    assert not cut_path(path).exists()  # it was another's


def test_who_cuts_a_log_finds_no_hole_in_what_comes_after(tmp_path: Path) -> None:
    path = log_path(tmp_path, 3)
    fd = start_log(path)
    os.write(fd, b"before")
    os.truncate(path, 0)
    os.write(fd, b"after")
    os.close(fd)
    assert path.read_bytes() == b"after"


def test_last_words_are_the_last_lines_and_at_most_a_kilobyte(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"line {n}\n" for n in range(10_000)))
    words = last_words(path)
    assert words.endswith("line 9998\nline 9999")
    assert words.startswith("line ")
    assert 900 < len(words) <= 1024
    path.write_text("x" * 5000)
    assert last_words(path) == "x" * 1024


def test_last_words_have_no_control_characters_and_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(
        b"\x1b[1;31merror:\x1b[0m bad\x00\x07 key s3cret\r\n\n50%\r99%\xff\n\x1b]0;t\x07end"
    )
    assert last_words(path, secret="s3cret") == "error: bad key ********\n50%\n99%\ufffd\nend"


def test_an_engine_that_said_nothing_has_no_last_words(tmp_path: Path) -> None:
    assert last_words(tmp_path / "none") == ""
    (tmp_path / "empty").touch()
    assert last_words(tmp_path / "empty") == ""
