"""The parts of a launcher, one by one."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gpustack.cli.lock_file import LockFile, running_node
from gpustack.errors import SettingsError
from gpustack.lib.role import Boot
from tests.support.wait import soon


def restart(data_dir: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpustack", "restart", "--data-dir", str(data_dir)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_what_a_dead_launcher_left_is_believed_by_nobody(tmp_path: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    said = {"pid": stranger.pid, "life": "x", "ready": True, "refusals": 0, "refused": ""}
    (tmp_path / "lock").write_text(json.dumps(said))
    refused = restart(tmp_path)
    assert refused.returncode == 1
    assert refused.stderr == f"Error: no node runs on data directory {tmp_path}\n"
    stranger.communicate()
    assert stranger.returncode != -signal.SIGUSR2


def test_a_restart_wants_a_data_directory_that_is_one() -> None:
    refused = restart("")
    assert refused.returncode == 1
    assert refused.stderr == "Error: option --data-dir: want a value, got empty text\n"


def test_a_reader_of_the_lock_file_never_sees_half_of_it(tmp_path: Path) -> None:
    lock = LockFile(tmp_path, None)
    done = threading.Event()

    def write() -> None:
        for number in range(2000):
            lock.say({"life": str(number), "refused": "x" * (3000 * (number % 2))})
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        node = running_node(tmp_path)
        assert node is not None
        assert len(node["refused"]) in {0, 3000}
    writer.join()
    lock.release()
    assert (tmp_path / "lock").read_bytes() == b""


def test_those_who_look_whether_a_node_runs_disturb_neither_it_nor_each_other(
    tmp_path: Path,
) -> None:
    left = {"pid": 1, "life": "of a launcher that was killed"}
    (tmp_path / "lock").write_text(json.dumps(left))
    done = threading.Event()
    found: list[object] = []

    def look() -> None:
        while not done.is_set():
            found.append(running_node(tmp_path))

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    soon(lambda: len(found) > 3000, "they have looked often")
    alone = list(found)
    try:
        for _ in range(20):
            lock = LockFile(tmp_path, None)  # raises if they kept it from starting
            lock.say({"pid": os.getpid(), "life": "ours"})
            lock.release()
    finally:
        done.set()
        for looker in lookers:
            looker.join()
    assert set(alone) == {None}


def test_a_launcher_names_itself_at_once_where_another_pid_stood(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text('{"pid": 1, "life": "x"}')
    lock = LockFile(tmp_path, None)
    assert lock.left_behind
    with pytest.raises(SettingsError, match=f"pid {os.getpid()}"):
        LockFile(tmp_path, None)
    lock.release()


def test_a_role_that_gives_up_on_purpose_says_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(
        "from gpustack.errors import SettingsError\n"
        "async def serve(boot):\n"
        "    raise SettingsError('the database is broken')\n"
    )
    run = "from gpustack.cli import role; role.ROLES['failing'] = 'failing'; role.main()"
    done = subprocess.run(
        [sys.executable, "-c", run, "failing"],
        input=Boot(settings={}).line(),
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.endswith(b"the database is broken\n")
    assert b"Traceback" not in done.stderr


def test_a_role_whose_launcher_died_as_it_started_it_says_so_in_one_sentence() -> None:
    command = [sys.executable, "-m", "gpustack.cli.role", "relay"]
    ended = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == (
        "relay does not start: the launcher closed the pipe before it said how to start\n"
    )
