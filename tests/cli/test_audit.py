"""`gpustack events` and `gpustack audit`, on a real node and without one."""

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.cli.conftest import environment
from tests.support.node import Node


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / "node", "--disable-worker")
    yield node
    node.kill()


def gpustack(node: Node, *words: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "gpustack", *words],
        env=environment(node.data_dir),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


def test_what_happened_and_who_did_it_is_listed_and_verified_with_a_server_and_without(
    node: Node,
) -> None:
    assert "no server has run here yet" in gpustack(node, "audit", "verify", status=1)
    node.start()
    assert gpustack(node, "audit", "verify") == "the audit log is empty\n"
    gpustack(node, "models", "deploy", "tiny", "/no/such.gguf", "--replicas", "0")
    gpustack(node, "api-keys", "create", "k")

    header, *rows = gpustack(node, "events", "tiny").splitlines()
    assert rows[-1][header.index("WHAT") :].split() == ["created", "user", "admin"]
    assert gpustack(node, "events", "nobody").count("\n") == 1
    (newest,) = json.loads(gpustack(node, "events", "--json", "--limit", "1"))
    assert newest["name"] == "tiny"

    header, key, model = gpustack(node, "audit", "list").splitlines()
    assert key[header.index("ACTION") :].split()[:3] == ["create", "api-keys", "k"]
    assert 'local_path: null -> "/no/such.gguf"' in model
    assert model[header.index("FROM") :].startswith("127.0.0.1 ")

    with_server = gpustack(node, "audit", "verify")
    assert with_server.startswith("entries 1 to 2 are as they were written\n")
    assert node.stop() == 0
    assert gpustack(node, "audit", "verify") == with_server
    with closing(sqlite3.connect(node.data_dir / "database.db")) as database, database:
        database.execute("UPDATE audit_log SET peer = '' WHERE id = 2")
    said = gpustack(node, "audit", "verify", status=1)
    assert said == "Error: audit log: entry 2: it does not say what was written\n"


def test_the_log_is_found_by_the_servers_config_file(node: Node, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"data_dir: {node.data_dir}\n")
    words = [sys.executable, "-m", "gpustack", "audit", "verify", "--config-file", str(config)]

    def verified() -> str:
        elsewhere = environment(tmp_path) | {"GPUSTACK_DATA_DIR": "", "HOME": str(tmp_path)}
        return subprocess.run(
            words, env=elsewhere, capture_output=True, text=True, timeout=60, check=True
        ).stdout

    node.start()
    assert verified() == "the audit log is empty\n"
    assert node.stop() == 0
    assert verified() == "the audit log is empty\n"


def test_a_password_that_was_reset_without_a_server_is_in_the_log(node: Node) -> None:
    node.start()
    assert node.stop() == 0
    gpustack(node, "reset-admin-password")
    node.start()
    (entry,) = json.loads(gpustack(node, "audit", "list", "--json"))
    assert (entry["action"], entry["kind"], entry["name"]) == ("update", "users", "admin")
    assert entry["credential_name"] == "the data directory, without a server"
    assert set(entry["changed"]) == {"password"}
    assert gpustack(node, "audit", "verify").startswith("entries 1 to 1 are ")
