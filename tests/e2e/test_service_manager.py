"""A node that a service manager starts: the sockets that it is given, the words that it says."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gpustack.lib.platform import listen, process_environment
from tests.e2e.conftest import MakeNode
from tests.support.node import Node
from tests.support.service_manager import ServiceManager, starter

READY = "READY"


def restart(node: Node) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpustack", "restart", "--data-dir", str(node.data_dir)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def holds(pid: int, one: socket.socket) -> bool:
    """Whether the process has this very socket open."""
    inode = f"socket:[{os.fstat(one.fileno()).st_ino}]"
    return inode in {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}


@pytest.mark.slow
def test_the_sockets_of_a_service_manager_are_the_nodes_for_good(
    make_node: MakeNode, models: Path
) -> None:
    node = make_node()
    address = f"@gpustack-test-{os.getpid()}"
    with (
        listen("127.0.0.1", node.port) as public,  # another address than --host: by its name
        listen("::", node.worker_port) as worker,  # by address and port: any is any
        ServiceManager(address) as manager,
        socket.create_connection(("127.0.0.1", node.port)) as early,
    ):
        early.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        manager.manage(node, ("public", public), ("gpustack.socket", worker)).start()
        assert early.recv(1 << 16).startswith(b"HTTP/1.1 200 ")  # it waited in the queue
        node.deploy("tiny", models / "chat.gguf")
        assert node.process is not None
        done = restart(node)
        assert done.returncode == 0, done.stderr
        for role, one in (("gateway", public), ("relay", worker)):
            assert holds(node.process.pid, one)
            assert any(holds(pid, one) for pid in node.pids(role))
        children = [pid for pid in (*node.pids(), *node.engine_pids()) if pid != node.process.pid]
        assert len(children) >= 5
        for pid in children:
            names = process_environment(pid).keys()
            assert not {name for name in names if name.startswith(("LISTEN_", "NOTIFY_"))}
        assert node.stop() == 0


@pytest.mark.parametrize("abstract", [False, True])
def test_a_service_manager_hears_how_the_node_is(
    make_node: MakeNode, tmp_path: Path, abstract: bool
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("debug: false\n")
    node = make_node("--disable-worker", "--config-file", str(file))
    with ServiceManager(f"@{tmp_path}" if abstract else str(tmp_path / "notify")) as manager:
        manager.manage(node).start()
        starting = manager.until(lambda said: READY in said, "it is ready")
        assert all(said.keys() == {"STATUS"} for said in starting[:-1])
        assert starting[-1]["STATUS"] == f"serving at {node.url}"

        assert node.process is not None
        node.process.send_signal(signal.SIGHUP)
        first, last = manager.until(lambda said: READY in said, "it has reloaded")
        assert first["RELOADING"] == "1"
        assert int(first["MONOTONIC_USEC"]) > 0
        assert last["STATUS"] == f"serving at {node.url}"

        file.write_text("prot: 1\n")
        for again in ("reload", "restart"):
            if again == "reload":
                node.process.send_signal(signal.SIGHUP)
            else:
                assert restart(node).returncode == 1
            first, last = manager.until(lambda said: READY in said, "it goes on as it was")
            assert "RELOADING" in first
            assert "did you mean port" in last["STATUS"]

        file.write_text("debug: true\n")
        assert restart(node).returncode == 0
        words = manager.until(lambda said: READY in said, "its successor is ready")
        assert "RELOADING" in words[0]
        assert words[0]["STATUS"] == "restarting"

        assert node.stop() == 0
        words = manager.until(lambda said: "the server" in said.get("STATUS", ""), "it stops")
        assert all(said["STOPPING"] == "1" for said in words)


@pytest.mark.parametrize("listening", [True, False])
def test_a_socket_that_is_none_of_the_nodes_is_an_error_at_once(
    make_node: MakeNode, listening: bool
) -> None:
    node = make_node()
    with socket.socket() as one:
        one.bind(("127.0.0.1", node.engine_ports[0]))
        if listening:
            one.listen()
        prefix, fds = starter(("gpustack.socket", one))
        failed = subprocess.run(
            [*prefix, sys.executable, "-m", "gpustack", "start", *node.arguments],
            capture_output=True,
            text=True,
            timeout=30,
            pass_fds=fds,
            check=False,
        )
    assert failed.returncode == 1
    why = "is none that this node listens on" if listening else "is no listening TCP socket"
    assert why in failed.stderr
    assert "gpustack.socket" in failed.stderr
    assert "Traceback" not in failed.stderr
