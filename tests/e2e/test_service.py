"""`gpustack service` with a systemd that runs."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import systemd
from tests.support.node import Node
from tests.support.systemd import UserManager
from tests.support.wait import soon

pytestmark = pytest.mark.slow


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[UserManager]:
    if (why := systemd.lacking()) is not None:
        pytest.skip(why)
    with systemd.user_manager(tmp_path / 'a home, 100%h "odd" $HOME') as made:
        yield made


def test_a_node_is_installed_outlives_a_crash_is_reloaded_and_removed(
    manager: UserManager, tmp_path: Path, models: Path
) -> None:
    home = Path(manager.variables["HOME"])
    node = Node(home / "data")

    def gpustack(*words: str, status: int = 0) -> str:
        done = manager.run(sys.executable, "-m", "gpustack", *words, status=status)
        return done.stdout + done.stderr

    gpustack("service", "install", "--user", *node.arguments, "--token", "of-this-test")
    gpustack("service", "install", "--user", *node.arguments, "--token", "of-this-test")
    said = gpustack("service", "status", "--user")
    assert "active (running), pid " in said
    assert f"serving at {node.url}" in said
    config = home / "config/gpustack/service.yaml"
    assert config.stat().st_mode & 0o777 == 0o600
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert b"of-this-test" not in file.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue

    node.deploy("tiny", models / "chat.gguf")
    (engine,) = node.engine_pids()
    crashed = _launcher(config)
    os.kill(crashed, signal.SIGKILL)
    soon(lambda: _launcher(config) not in {0, crashed}, "it is started again", within_s=30)
    soon(lambda: node.said().get("ready"), "it serves again", within_s=30)
    assert node.engine_pids() == [engine]

    config.write_text(config.read_text() + "debug: true\n")
    manager.run("systemctl", "--user", "reload", "gpustack")
    soon(lambda: "active" in gpustack("service", "status", "--user"), "it goes on")
    config.write_text(config.read_text() + "prot: 1\n")
    manager.run("systemctl", "--user", "reload", "gpustack", status=1)

    more = home / "config/systemd/user/gpustack.service.d"
    more.mkdir()
    said = gpustack("service", "uninstall", "--user")
    assert str(config) in said
    assert f"stays, as it is yours: {more}\n" in said
    assert not node.engine_pids()
    assert _launcher(config) == 0
    assert "is not installed" in gpustack("service", "status", "--user", status=1)


def test_what_is_left_of_a_service_is_removed(manager: UserManager) -> None:
    home = Path(manager.variables["HOME"])
    node = Node(home / "data")
    install = [sys.executable, "-m", "gpustack", "service", "install", "--user", *node.arguments]
    uninstall = [sys.executable, "-m", "gpustack", "service", "uninstall", "--user"]
    manager.run(*install, "--disable-worker")
    (home / "config/systemd/user/gpustack.service").unlink()
    refused = manager.run(*install, "--disable-worker", "--debug", status=1)
    assert "remove it: `gpustack service uninstall`" in refused.stderr
    config = home / "config/gpustack/service.yaml"
    assert _launcher(config) != 0
    assert manager.run(*uninstall).stdout == f"removed: {config}\n"
    assert _launcher(config) == 0
    assert not [one for one in home.rglob("*.service") if one.is_symlink()]
    assert "is not installed" in manager.run(*uninstall, status=1).stderr


def _launcher(config: Path) -> int:
    """The pid of the node that runs with `config`; 0: none does."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words[2:5] == ["gpustack", "start", "--config-file"] and words[5] == str(config):
            return int(file.parent.name)
    return 0
