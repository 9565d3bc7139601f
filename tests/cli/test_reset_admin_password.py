"""A new password for user admin, with the server and without it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gpustack.cli.connection import connection
from gpustack.cli.lock_file import LockFile
from tests.cli.conftest import environment
from tests.support.node import Node
from tests.support.wait import soon

FIRST = "Bootstrap-1"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / "node", "--disable-worker", "--bootstrap-password", FIRST)
    yield node
    node.kill()


def reset(data_dir: Path, *, status: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "gpustack", "reset-admin-password"],
        env=environment(data_dir) | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == status, done.stderr
    return done


def new_password(data_dir: Path) -> str:
    done = reset(data_dir)
    (password,) = done.stdout.splitlines()
    assert password not in done.stderr
    return password


def log_in(node: Node, password: str) -> tuple[int, httpx.Cookies]:
    with node.http(None) as http:
        answer = http.post("/auth/login", data={"username": "admin", "password": password})
        return answer.status_code, answer.cookies


def me(node: Node, cookies: httpx.Cookies) -> httpx.Response:
    # Not by the loopback rule: a cookie that is no good is refused.
    with node.http(None, cookies=cookies) as http:
        return http.get("/v2/users/me")


def test_the_password_is_reset_while_the_server_runs_and_while_it_does_not(node: Node) -> None:
    node.start()
    _, first_session = log_in(node, FIRST)
    assert me(node, first_session).status_code == 200
    second = new_password(node.data_dir)
    assert me(node, first_session).status_code == 401
    assert log_in(node, FIRST)[0] == 401
    status, second_session = log_in(node, second)
    assert (status, me(node, second_session).json()["require_password_change"]) == (204, True)
    assert node.stop() == 0

    third = new_password(node.data_dir)
    assert third != second
    node.start()
    assert me(node, second_session).status_code == 401
    assert log_in(node, second)[0] == 401
    assert log_in(node, third)[0] == 204
    assert third not in node.log.read_text()
    assert node.stop() == 0


def test_where_no_server_ever_ran_nothing_is_made(tmp_path: Path) -> None:
    data_dir = tmp_path / "nothing"
    done = reset(data_dir, status=1)
    assert done.stderr.startswith("Error: no server has run here yet: there is no ")
    assert not data_dir.exists()


def test_a_worker_has_no_admin(tmp_path: Path) -> None:
    lock = LockFile(tmp_path, None)
    lock.say({"pid": os.getpid(), "life": "x", "port": None})
    assert "is a worker: run this on its server" in reset(tmp_path, status=1).stderr
    lock.release()


def test_commands_believe_a_port_only_while_its_node_runs(tmp_path: Path) -> None:
    said = {"pid": os.getpid(), "life": "x", "port": 20123}
    (tmp_path / "lock").write_text(json.dumps(said))  # as a node that was killed leaves it
    assert connection(None, None, tmp_path).url == "http://127.0.0.1:80"
    lock = LockFile(tmp_path, None)
    lock.say(said)
    assert connection(None, None, tmp_path).url == "http://127.0.0.1:20123"
    lock.release()


def test_a_server_that_starts_is_waited_for(node: Node) -> None:
    node.start(wait=False)
    assert node.process is not None
    pid = node.process.pid
    soon(lambda: node.said().get("pid") == pid, "it has the lock")
    assert not node.said()["ready"]
    assert log_in(node, new_password(node.data_dir))[0] == 204
    assert node.stop() == 0


def test_while_a_password_is_reset_a_start_is_told_so(tmp_path: Path) -> None:
    held = "; ".join(
        (
            "import sys",
            "from gpustack.cli.own_database import settings_of, take",
            f"take(settings_of({{'data_dir': {str(tmp_path)!r}}}), 'reset-admin-password')",
            "print(flush=True)",
            "sys.stdin.read()",
        )
    )
    (tmp_path / "database.db").touch()
    with subprocess.Popen(
        [sys.executable, "-c", held],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(tmp_path), text=True,
    ) as resetting:  # fmt: skip
        assert resetting.stdout
        resetting.stdout.readline()
        refused = Node(tmp_path, "--disable-worker")
        refused.start(wait=False)
        assert refused.process
        assert refused.process.wait(60) == 1
        said = f"`gpustack reset-admin-password` is at work on data directory {tmp_path}: "
        assert f"{said}pid {resetting.pid}. Try again when" in refused.log.read_text()
    assert resetting.returncode == 0
    assert (tmp_path / "lock").read_text() == ""


def test_what_cannot_be_found_is_named(tmp_path: Path) -> None:
    assert "set GPUSTACK_DATABASE_URL to the same" in reset(tmp_path, status=1).stderr
    database = tmp_path / "elsewhere.db"
    database.touch()
    done = reset(tmp_path / "none", status=1, GPUSTACK_DATABASE_URL=f"sqlite:///{database}")
    assert done.stderr == (
        f"Error: there is no data directory {tmp_path / 'none'}: give the server's, as --data-dir "
        "or GPUSTACK_DATA_DIR\n"
    )
