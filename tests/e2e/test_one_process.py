"""`--gateway-mode disabled`: server and gateway are one process."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.conftest import MakeNode
from tests.support.node import Node
from tests.support.streams import Stream, client, load, running_streams
from tests.support.wait import eventually, soon

ROLE = "server+gateway"
PASSWORD = "Given-pass-1"


@pytest.fixture(scope="module")
def node(make_node: MakeNode) -> Node:
    options = ("--gateway-mode", "disabled", "--bootstrap-password", PASSWORD)
    return make_node(*options, "--force-auth-localhost").start()


@pytest.fixture(scope="module")
def served(node: Node, models: Path) -> Node:
    threads = ["--threads=1", "--threads-batch=1"]
    node.deploy("slow", models / "slow.gguf", backend_parameters=threads)
    return node


def restart(node: Node) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpustack", "restart", "--data-dir", str(node.data_dir)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_one_process_has_the_public_port_and_that_of_metrics(node: Node) -> None:
    (pid,) = node.pids(ROLE)
    assert not node.pids("server")
    assert not node.pids("gateway")
    sockets = psutil.Process(pid).net_connections("tcp")
    listening = {one.laddr.port for one in sockets if one.status == psutil.CONN_LISTEN}
    assert listening == {node.port, node.metrics_port}
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{node.api_port}/healthz", trust_env=False)


def test_it_answers_what_gateway_and_server_answer(served: Node) -> None:
    with served.http(None) as browser:
        assert browser.get("/v2/models").status_code == 401
        assert browser.get("/v1/models").status_code == 401
        form = {"username": "admin", "password": PASSWORD}
        assert browser.post("/auth/login", data=form).status_code == 204
        assert browser.get("/v2/users/me").json()["username"] == "admin"
        assert [one["id"] for one in browser.get("/v1/models").json()["data"]] == ["slow"]
        large = {"name": "x" * 2_000_000, "source": "local_path", "local_path": "/x"}
        assert browser.post("/v2/models", json=large).status_code == 422  # a body of many reads


def test_watches_are_followed_and_end_with_their_client(served: Node) -> None:
    with served.http() as http, http.stream("GET", "/v2/watch?kinds=models") as watch:
        seen = []
        for line in watch.iter_lines():
            event = json.loads(line)
            seen.append(event["type"])
            if event["type"] == "synced":
                break
        assert seen == ["put", "synced"]


async def test_streams_outlast_a_restart_and_nobody_is_turned_away(served: Node) -> None:
    key, (old,) = served.api_key(), served.pids(ROLE)
    async with running_streams(served, key, "slow", max_tokens=400) as streams:
        async with load(served, key, "slow", workers=1) as failures:
            done = await asyncio.to_thread(restart, served)
            assert done.returncode == 0, done.stderr
            assert not any(stream.finish_reason for stream in streams), "too fast to test with"
            assert old in served.pids(ROLE)
    assert failures == []

    async def gone() -> bool:
        return old not in served.pids(ROLE)

    await eventually(gone, "the old process ends with its streams")
    assert served.engine_pids()


async def test_it_is_started_again_when_it_is_killed_and_engines_live_on(served: Node) -> None:
    engines, old = sorted(served.engine_pids()), served.kill_role(ROLE)
    stream = Stream()

    async def answers() -> bool:
        try:
            async with client(served, served.api_key(), retries=2) as openai:
                await stream.run(openai, "slow", "again", max_tokens=4)
        except Exception:  # noqa: BLE001  whatever the client makes of a server that is not there
            return False
        return stream.whole

    await eventually(answers, "it answers again")
    assert old not in served.pids(ROLE)
    assert sorted(served.engine_pids()) == engines


async def test_a_stop_finishes_streams_then_engines_then_the_rest(
    make_node: MakeNode, models: Path
) -> None:
    node = make_node("--gateway-mode", "disabled").start()
    node.deploy("slow", models / "slow.gguf", backend_parameters=["--threads=1"])
    process = node.process
    assert process is not None
    with node.http() as http, http.stream("GET", "/v2/watch?kinds=models") as watch:
        lines = watch.iter_lines()
        next(lines)
        async with running_streams(node, node.api_key(), "slow", max_tokens=200):
            process.send_signal(signal.SIGTERM)

            async def refused() -> bool:
                async with httpx.AsyncClient(base_url=node.url, trust_env=False) as late:
                    answer = await late.post("/v1/chat/completions", json={"model": "slow"})
                    said = (answer.status_code, answer.json()["error"]["message"])
                    return said == (503, "This node is stopping.")

            await eventually(refused, "new requests are refused")
    assert await asyncio.to_thread(process.wait, 20) == 0
    assert not node.engine_pids()
    log = node.log.read_text()
    assert "the server did not hear our last reports" not in log
    assert "did not end in time" not in log


def test_a_server_that_cannot_start_says_one_sentence(make_node: MakeNode) -> None:
    node = make_node("--gateway-mode", "disabled", "--disable-worker")
    node.data_dir.mkdir(exist_ok=True)
    (node.data_dir / "database.db").write_text("this is no database, " * 100)
    node.start(wait=False)
    soon(lambda: f"{ROLE} ended (exit code 1)" in node.log.read_text(), "it says so")
    assert f"E {ROLE} __main__: --database-url: cannot use" in node.log.read_text()
    assert "Traceback" not in node.log.read_text()
    assert node.process is not None
    os.kill(node.process.pid, signal.SIGTERM)
    assert node.process.wait(20) == 0


@pytest.mark.parametrize("mode", ["in-cluster", "external"])
def test_modes_that_need_kubernetes_are_refused_at_start(make_node: MakeNode, mode: str) -> None:
    node = make_node("--gateway-mode", mode)
    assert node.start(wait=False).process is not None
    assert node.process is not None
    assert node.process.wait(20) == 1
    assert f"--gateway-mode: {mode} needs the support of Kubernetes" in node.log.read_text()


def test_in_a_pod_auto_is_embedded_and_says_so(make_node: MakeNode) -> None:
    node = make_node("--disable-worker")
    node.environment["KUBERNETES_SERVICE_HOST"] = "10.0.0.1"
    node.start()
    assert "--gateway-mode auto is embedded" in node.log.read_text()
    assert node.pids("gateway")
    assert node.stop() == 0
