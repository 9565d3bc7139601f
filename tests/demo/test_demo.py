"""`make demo`, without make."""

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from demo import tiny_gguf
from gpustack.lib.platform import live_pids, process_environment


@contextmanager
def demo(folder: Path, /, **variables: str) -> Iterator[subprocess.Popen[str]]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GPUSTACK_", "DEMO_"))}
    kept.pop("MODEL", None)
    with subprocess.Popen(
        [sys.executable, "-m", "demo"],
        env=kept | {"DEMO_DIR": str(folder), **variables},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.terminate()  # it stops its node
            process.wait(60)


def left_over(folder: Path) -> list[int]:
    """Live processes of the demo's node, engines included."""
    marks = (f"{folder}/", str(folder))
    found = []
    for pid in live_pids():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        home = process_environment(pid).get("GPUSTACK_ENGINE_HOME")
        if pid != os.getpid() and (home == str(folder) or any(m in command for m in marks)):
            found.append(pid)
    return found


def test_the_demo_does_the_main_job_and_ends_by_itself(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    with demo(folder, DEMO_EXIT="1") as process:
        out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert re.search(r"time to first token: +\d+ ms", out)
    assert re.search(r"tokens per second: +\d+ \(64 tokens\)", out)
    assert re.search(r"URL: +http://127.0.0.1:\d+/v1", out)
    place = re.search(r"admin password: +in (\S+)", out)
    assert place
    assert len(Path(place[1]).read_text().strip()) >= 8
    assert sum(word in tiny_gguf.WORDS for word in out.split()) >= 64
    assert not left_over(folder)


def test_ctrl_c_stops_the_node_with_status_0_and_the_next_demo_takes_over(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    model = tiny_gguf.write(tmp_path / "mine.gguf", seed=7)
    for variables in ({}, {"MODEL": str(model)}):
        with demo(folder, **variables) as process:
            assert process.stdout
            seen = []
            for line in process.stdout:
                seen.append(line)
                if "until Ctrl-C" in line:
                    break
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0, process.communicate()
        assert any("model demo" in line for line in seen)
        assert not left_over(folder)


def test_a_model_that_is_not_there_is_said_before_anything_starts(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    with demo(folder, MODEL=str(tmp_path / "none.gguf")) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "there is no file" in err
    assert out == ""


@pytest.mark.slow
def test_a_demo_whose_reader_goes_away_still_stops_its_node(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    with demo(folder, DEMO_EXIT="1") as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline().startswith("node ready")
        process.stdout.close()  # as `| head -1` does
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
    assert not left_over(folder)


@pytest.mark.slow
def test_a_demo_whose_terminal_closes_stops_its_node(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    on_terminal = (
        "import fcntl, runpy, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "runpy.run_module('demo', run_name='__main__')"
    )
    ours, theirs = pty.openpty()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GPUSTACK_", "DEMO_"))}
    with subprocess.Popen(
        [sys.executable, "-c", on_terminal], env=kept | {"DEMO_DIR": str(folder), "MODEL": ""},
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    ) as process:  # fmt: skip
        os.close(theirs)
        seen = b""
        while b"node ready" not in seen:
            seen += os.read(ours, 1024)
        os.close(ours)
        assert process.wait(60) == 0
    assert not left_over(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_at_any_moment_of_the_start_leaves_no_node(
    number: signal.Signals, tmp_path: Path
) -> None:
    folder = tmp_path / "demo"
    with demo(folder) as process:
        while not (folder / "node.log").exists():  # it is being started
            assert process.poll() is None
        process.send_signal(number)
        assert process.wait(60) == 0, process.communicate()
    assert not left_over(folder)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"MODEL": "a" * 300}, "want /a/path.gguf or org/repo[:file]"),
        ({"MODEL": "/" + "a" * 300}, "File name too long"),
        ({"MODEL": "bad\x01org/repo/x"}, "want /a/path.gguf or org/repo[:file]"),
        ({"DEMO_DIR": "/dev/null"}, "/dev/null: "),
    ],
)
def test_what_goes_wrong_is_one_sentence(
    variables: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    with demo(tmp_path / "demo", **variables) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("demo: ")
    assert sentence in err
    assert len(err.splitlines()) == 1
    assert out == ""


def test_a_node_that_cannot_start_gives_its_reason(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    with demo(folder) as first:
        assert first.stdout
        assert any("until Ctrl-C" in line for line in first.stdout)
        with demo(folder, DEMO_EXIT="1") as second:
            _, err = second.communicate(timeout=60)
        assert second.returncode == 1
        assert "already runs" in err
        first.send_signal(signal.SIGINT)
        assert first.wait(60) == 0
