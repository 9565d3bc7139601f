"""`gpustack db backup` and `restore` on real nodes. What they do: tests/server/test_backups.py."""

import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from demo import tiny_gguf
from gpustack.server.db.migrate import HEAD
from tests.cli.conftest import environment
from tests.support.node import Node
from tests.support.wait import soon


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / "node", "--disable-worker")
    yield node
    node.kill()


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data directory of a server that has run."""
    node = Node(tmp_path_factory.mktemp("used") / "node", "--disable-worker")
    try:
        node.start()
        deployed(node, "m")
        assert node.stop() == 0
    finally:
        node.kill()
    return node.data_dir


def run(
    data_dir: Path, *words: object, status: int = 0, room: int | None = None, **variables: str
) -> str:
    """What `gpustack db …` said to people.

    Args:
        room: bytes that a file may have; more is refused, as on a disk that is full.
    """

    def limit() -> None:
        if room is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    done = subprocess.run(
        [sys.executable, "-m", "gpustack", "db", *map(str, words)],
        env=environment(data_dir) | {"PYTHONDONTWRITEBYTECODE": "1"} | variables,
        capture_output=True, text=True, timeout=60, check=False, preexec_fn=limit,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    return done.stderr


def deployed(node: Node, name: str) -> int:
    return node.deploy(name, Path("/no/such.gguf"), replicas=0)


def names(node: Node) -> set[str]:
    with node.http() as http:
        return {one["name"] for one in http.get("/v2/models").json()["items"]}


def events(node: Node, since: str | None = None) -> list[dict[str, Any]]:
    """What a watch of models says up to the end of its list."""
    heard = []
    query = {"watch": "true"} | ({"since": since} if since else {})
    with node.http() as http, http.stream("GET", "/v2/models", params=query) as stream:
        for line in stream.iter_lines():
            heard.append(json.loads(line))
            if heard[-1]["type"] == "synced":
                break
    return heard


def revision(cursor: str) -> int:
    return int(cursor.rpartition(".")[2])


def ask(path: Path, query: str) -> Any:
    with closing(sqlite3.connect(path)) as database:
        return database.execute(query).fetchone()[0]


def test_a_node_goes_back_to_what_was_backed_up_while_it_ran(node: Node, tmp_path: Path) -> None:
    file, database = tmp_path / "b.db", node.data_dir / "database.db"
    node.start()
    deployed(node, "a")
    said = run(node.data_dir, "backup", file)
    assert said == f"{file}: {file.stat().st_size / 2**20:.1f} MiB; keep it like a password\n"
    later, cursor = deployed(node, "b"), events(node)[-1]["cursor"]
    assert node.process is not None
    said = run(node.data_dir, "restore", file, status=1)
    assert f"already runs on data directory {node.data_dir}: pid {node.process.pid}" in said
    assert names(node) == {"a", "b"}
    assert node.stop() == 0

    kept_said, done_said = run(node.data_dir, "restore", file).splitlines()
    assert done_said == "restored; start the server"
    kept = Path(kept_said.removeprefix("what was there before is now "))
    assert kept.parent == node.data_dir
    assert {one.name for one in node.data_dir.glob("*database*")} == {kept.name, database.name}
    assert database.stat().st_mode & 0o777 == 0o600
    node.start()
    assert names(node) == {"a"}
    assert deployed(node, "c") > later
    assert deployed(node, "d") > later
    again = events(node, since=cursor)
    assert [one["type"] for one in again] == ["resync", "put", "put", "put", "synced"]
    assert revision(again[-1]["cursor"]) > revision(cursor)  # which alone would not tell
    assert node.stop() == 0

    run(node.data_dir, "restore", kept)
    node.start()
    assert names(node) == {"a", "b"}
    assert node.stop() == 0


@pytest.mark.slow
def test_a_backup_of_a_server_that_is_written_to_is_whole(node: Node, tmp_path: Path) -> None:
    """The history and the audit log end where the counter and the chain say."""
    node.start()
    enough, made, before = threading.Event(), 0, 0

    def write() -> None:
        nonlocal made
        with node.http() as http:
            while not enough.is_set():
                http.post("/v2/api-keys", json={"name": f"k{made}"}).raise_for_status()
                made += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        soon(lambda: made > 0, "the server is written to")
        for number in range(3):
            before, file = made, tmp_path / f"b{number}"
            run(node.data_dir, "backup", file)
            keys = ask(file, "SELECT count(*) FROM credentials WHERE kind = 'key'")
            assert before <= keys <= made + 1
            assert ask(file, "SELECT max(revision) FROM changes") == ask(
                file, "SELECT revision FROM counter"
            )
            assert ask(file, "SELECT max(id) FROM audit_log") == keys
            assert ask(file, "SELECT last_id FROM audit_chain") == keys
    finally:
        enough.set()
        writer.join()
    assert made > before
    assert node.stop() == 0


@pytest.mark.slow
def test_a_server_that_was_killed_is_backed_up_and_kept_with_all_it_acknowledged(
    node: Node, tmp_path: Path
) -> None:
    """The last of it is in SQLite's log beside the file."""
    node.start()
    run(node.data_dir, "backup", tmp_path / "before")
    deployed(node, "last")
    node.kill()
    assert (node.data_dir / "database.db-wal").stat().st_size > 0
    shutil.copytree(node.data_dir, tmp_path / "copy")
    run(tmp_path / "copy", "backup", tmp_path / "after")
    assert ask(tmp_path / "after", "SELECT name FROM models") == "last"
    said = run(node.data_dir, "restore", tmp_path / "before")
    kept = said.splitlines()[0].removeprefix("what was there before is now ")
    assert not (node.data_dir / "database.db-wal").exists()
    assert ask(Path(kept), "SELECT name FROM models") == "last"
    assert ask(node.data_dir / "database.db", "SELECT count(*) FROM models") == 0


@pytest.mark.slow
def test_workers_end_what_the_backup_does_not_have_and_never_take_it_for_something_new(
    tmp_path: Path,
) -> None:
    """An engine that outlives the restore must not become the instance that is made next."""
    file = tiny_gguf.write(tmp_path / "tiny.gguf", context=256)
    server = Node(tmp_path / "server", "--disable-worker")
    worker = Node(tmp_path / "worker", server=server.start())
    try:
        worker.start()
        kept = server.deploy("kept", file)
        (engine,) = worker.engine_pids()
        run(server.data_dir, "backup", tmp_path / "b")
        forgotten = server.deploy("forgotten", file)
        (last,) = server.instances(forgotten)
        frozen = [*worker.pids("start"), *worker.pids("agent")]
        for pid in frozen:  # it is away, and hears of nothing between
            os.kill(pid, signal.SIGSTOP)
        assert server.stop() == 0
        run(server.data_dir, "restore", tmp_path / "b")
        server.start()
        with server.http() as http:
            body = {"name": "new", "source": "local_path", "local_path": str(file)}
            new = http.post("/v2/models", json=body).json()["id"]
        (made,) = server.wait_instances(new, lambda found: len(found) == 1, "it is made")
        assert made["id"] > last["id"]
        for pid in reversed(frozen):
            os.kill(pid, signal.SIGCONT)
        server.wait_instances(new, lambda found: found[0]["state"] == "running", "new runs")
        soon(lambda: len(worker.engine_pids()) == 2, "the forgotten one's engine has ended")
        assert engine in worker.engine_pids()
        (same,) = server.instances(kept)
        assert (same["state"], same["restart_count"]) == ("running", 0)
    finally:
        worker.kill()
        server.kill()


def test_a_backup_makes_a_server_where_there_was_none(used: Path, tmp_path: Path) -> None:
    run(used, "backup", tmp_path / "b")
    node = Node(tmp_path / "elsewhere", "--disable-worker")
    assert run(node.data_dir, "restore", tmp_path / "b") == "restored; start the server\n"
    try:
        node.start()
        assert names(node) == {"m"}
        assert node.stop() == 0
    finally:
        node.kill()


def test_the_cluster_of_another_is_said_to_be_another(used: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        run(used, "backup", tmp_path / name)
    with closing(sqlite3.connect(tmp_path / "other")) as database, database:
        database.execute("UPDATE cluster SET cluster_id = 'other'")
    for name, is_another in (("one", False), ("one", False), ("other", True)):
        said = run(tmp_path / "node", "restore", tmp_path / name)
        assert ("it was another cluster: the workers of that one will not" in said) is is_another


def test_a_backup_replaces_a_file_only_when_told_to(used: Path, tmp_path: Path) -> None:
    file = tmp_path / "b"
    file.write_text("precious")
    file.chmod(0o644)
    said = run(used, "backup", file, status=1)
    assert said == f"Error: {file} is there already: give another name, or --force\n"
    assert file.read_text() == "precious"
    run(used, "backup", "--force", file)
    assert ask(file, "SELECT name FROM models") == "m"
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
@pytest.mark.parametrize("name", ["database.db", "database.db-wal", "link"])
def test_a_backup_never_takes_the_place_of_the_database_that_it_is_of(
    node: Node, tmp_path: Path, name: str
) -> None:
    """The server would go on with a file that has no name any more."""
    node.start()
    deployed(node, "a")
    (node.data_dir / "link").symlink_to("database.db")
    file = node.data_dir / name
    said = run(node.data_dir, "backup", "--force", file, status=1)
    assert said == f"Error: {file} is the database itself: give another name\n"
    assert run(node.data_dir, "backup", tmp_path / "b").startswith(str(tmp_path / "b"))


def of_a_newer_release(file: Path) -> None:
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")


def of_another_program(file: Path) -> None:
    file.unlink()
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
        database.execute("INSERT INTO alembic_version VALUES ('0001')")


def torn(file: Path) -> None:
    """A page in the middle was lost."""
    raw = bytearray(file.read_bytes())
    root = ask(file, "SELECT rootpage FROM sqlite_master WHERE name = 'models'")
    raw[(root - 1) * 4096 : root * 4096] = b"\xff" * 4096
    file.write_bytes(raw)


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda file: file.write_text("certainly no database" * 500), "file is not a database"),
    "empty": (lambda file: file.write_bytes(b""), "no such table: alembic_version"),
    "cut": (lambda file: os.truncate(file, file.stat().st_size // 2), "malformed"),
    "torn": (torn, "is damaged: "),
    "newer": (of_a_newer_release, f"newer release (schema 9999, this one has {HEAD}): install"),
    "foreign": (of_another_program, "no database of gpustack: no such table: cluster"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_whole_backup_is_refused_and_changes_nothing(
    used: Path, tmp_path: Path, mistake: str
) -> None:
    file, before = tmp_path / "b", (used / "database.db").read_bytes()
    run(used, "backup", file)
    spoil, why = MISTAKES[mistake]
    spoil(file)
    there = set(used.iterdir())
    said = run(used, "restore", file, status=1)
    assert why in said
    assert str(file) in said
    assert said.count("\n") == 1
    assert (used / "database.db").read_bytes() == before
    assert set(used.iterdir()) == there


def test_a_damaged_database_is_kept_and_its_log_is_not_taken_for_the_new_ones(
    used: Path, tmp_path: Path
) -> None:
    """Whoever restores, the server's user owns the new one."""
    owner = 65534 if os.geteuid() == 0 else os.geteuid()
    run(used, "backup", tmp_path / "b")
    data_dir = tmp_path / "damaged"
    data_dir.mkdir()
    (data_dir / "database.db").write_text("certainly no database" * 500)
    (data_dir / "database.db-wal").write_text("its log")
    os.chown(data_dir / "database.db", owner, -1)
    said = run(data_dir, "restore", tmp_path / "b")
    kept = said.splitlines()[0].removeprefix("what was there before is now ")
    assert Path(kept).read_text().startswith("certainly")
    assert not (data_dir / "database.db-wal").exists()
    assert (data_dir / "database.db").stat().st_uid == owner
    assert ask(data_dir / "database.db", "SELECT name FROM models") == "m"


def test_a_database_that_somebody_else_uses_is_not_replaced(used: Path, tmp_path: Path) -> None:
    file, database = tmp_path / "b", used / "database.db"
    run(used, "backup", file)
    with closing(sqlite3.connect(database)) as other:
        other.execute("PRAGMA journal_mode=WAL")
        other.execute("BEGIN IMMEDIATE")
        said = run(used, "restore", file, status=1)
    assert said == f"Error: {database} is in use or cannot be written: database is locked\n"


def test_a_target_without_room_is_left_as_it_was(used: Path, tmp_path: Path) -> None:
    file, before = tmp_path / "folder" / "b", (used / "database.db").read_bytes()
    file.parent.mkdir()
    said = run(used, "backup", file, status=1, room=64 * 1024)
    assert said.startswith(f"Error: cannot copy {used / 'database.db'} to {file.parent}: ")
    assert list(file.parent.iterdir()) == []
    run(used, "backup", file)
    there = set(used.iterdir())
    said = run(used, "restore", file, status=1, room=64 * 1024)
    assert said.startswith(f"Error: cannot copy {file} to {used}: ")
    assert (used / "database.db").read_bytes() == before
    assert set(used.iterdir()) == there


def test_a_backup_never_replaces_what_is_no_file(used: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    said = run(used, "backup", "--force", tmp_path / "pipe", status=1)
    assert said == f"Error: {tmp_path / 'pipe'} is no file: a backup must be one\n"
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("target", ["/proc/self/b", "/no/such/folder/b", "/dev"])
def test_a_target_that_cannot_be_written_is_one_sentence(used: Path, target: str) -> None:
    said = run(used, "backup", target, status=2 if target == "/dev" else 1)
    (sentence,) = (line for line in said.splitlines() if line.startswith("Error: "))
    assert target.removesuffix("/b") in sentence


def test_where_no_server_ever_ran_there_is_nothing_to_back_up(tmp_path: Path) -> None:
    said = run(tmp_path / "none", "backup", tmp_path / "b", status=1)
    assert said.startswith("Error: no server has run here yet: there is no ")
    assert list(tmp_path.iterdir()) == []


def test_the_node_is_found_by_its_config_file(used: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"data_dir: {used}\n")
    words = ("backup", tmp_path / "b", "--config-file", config)
    run(tmp_path, *words, GPUSTACK_DATA_DIR="")
    assert ask(tmp_path / "b", "SELECT name FROM models") == "m"


@pytest.mark.slow
def test_a_postgresql_of_the_nodes_own_is_backed_up_with_the_node_and_without(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tmp_path = tmp_path_factory.mktemp("own")  # short: a socket is below it
    node = Node(tmp_path / "node", "--disable-worker", "--database-url", "embedded://")
    db = partial(run, node.data_dir, GPUSTACK_DATABASE_URL="embedded://")
    try:
        deployed(node.start(), "a")
        db("backup", tmp_path / "running")
        deployed(node, "b")
        assert node.stop() == 0
        db("backup", tmp_path / "stopped")
        assert ask(tmp_path / "stopped", "SELECT count(*) FROM models") == 2
        said = db("restore", tmp_path / "running")
        kept = said.splitlines()[0].removeprefix("what was there before is now ")
        assert ask(Path(kept), "SELECT count(*) FROM models") == 2
        node.start()
        assert names(node) == {"a"}
        run(tmp_path / "moved", "restore", tmp_path / "stopped")  # to SQLite
        assert ask(tmp_path / "moved" / "database.db", "SELECT count(*) FROM models") == 2
        assert node.stop() == 0
    finally:
        node.kill()
