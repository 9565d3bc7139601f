"""`gpustack start`: one node per data directory, clear errors, clean ends."""

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from gpustack.lib import trust
from gpustack.schemas.wire import WORKER_CERTIFICATE_FILE
from tests.e2e.conftest import MakeNode
from tests.support.node import Node
from tests.support.ports import free_ports
from tests.support.streams import running_streams
from tests.support.wait import eventually, soon


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpustack", *words], capture_output=True, text=True, timeout=30
    )


def test_a_second_start_on_the_same_data_directory_names_the_pid_that_runs(node: Node) -> None:
    assert node.process is not None
    second = run("start", *node.arguments)
    assert second.returncode == 1
    assert f"pid {node.process.pid}" in second.stderr
    assert "Traceback" not in second.stderr


@pytest.mark.parametrize(
    "option",
    ["--port", "--api-port", "--worker-port", "--metrics-port", "--worker-metrics-port"],
)
def test_a_taken_port_is_named_with_the_option_that_changes_it(
    make_node: MakeNode, option: str
) -> None:
    node = make_node()
    port = {
        "--port": node.port,
        "--api-port": node.api_port,
        "--worker-port": node.worker_port,
        "--metrics-port": node.metrics_port,
        "--worker-metrics-port": node.worker_metrics_port,
    }
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", port[option]))
        taken.listen()
        failed = run("start", *node.arguments)
    assert failed.returncode == 1
    assert f"{option} {port[option]} is taken" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_an_unknown_option_and_a_bad_value_are_one_sentence() -> None:
    for words, part in ((["--prot", "1"], "--port"), (["--port", "x"], "1 to 65535")):
        failed = run("start", *words)
        assert failed.returncode in {1, 2}
        assert part in failed.stderr
        assert "Traceback" not in failed.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything_engines_too(
    make_node: MakeNode, models: Path, number: signal.Signals
) -> None:
    node = make_node().start()
    node.deploy("tiny", models / "chat.gguf")
    assert node.process is not None
    pids = [*node.pids(), *node.engine_pids()]
    assert len(pids) >= 6
    node.process.send_signal(number)
    assert node.process.wait(20) == 0
    soon(lambda: not node.engine_pids() and not node.pids(), "nothing is left")
    assert list((node.data_dir / "engines").glob("*.json")) == []


def test_a_node_that_starts_again_serves_what_it_served(make_node: MakeNode, models: Path) -> None:
    node = make_node().start()
    model_id = node.deploy("tiny", models / "chat.gguf")
    key = node.api_key()
    assert node.stop() == 0
    node.start()
    node.wait_instances(model_id, lambda found: found[0]["state"] == "running", "running again")
    with node.http(key) as http:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert node.stop() == 0


def test_an_idle_node_stops_within_three_seconds(make_node: MakeNode) -> None:
    node = make_node().start()
    began = time.monotonic()
    assert node.stop() == 0
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("apart_s", [0, 0.05, 0.1, 0.2, 0.3, 0.4])
def test_a_stop_close_to_a_restart_is_not_lost(make_node: MakeNode, apart_s: float) -> None:
    node = make_node("--disable-worker").start()
    assert node.process is not None
    node.process.send_signal(signal.SIGUSR2)
    time.sleep(apart_s)  # no state to wait for: each of these moments must do
    node.process.send_signal(signal.SIGTERM)
    assert node.process.wait(20) == 0
    soon(lambda: not node.pids(), "nothing is left")


@pytest.mark.parametrize("moment", ["has the lock", "starts its roles"])
def test_a_stop_during_the_start_ends_the_engines_of_an_earlier_life(
    make_node: MakeNode, models: Path, moment: str
) -> None:
    node = make_node().start()
    node.deploy("tiny", models / "chat.gguf")
    assert node.process is not None
    node.process.kill()
    node.process.wait()
    soon(lambda: not node.pids(), "the roles end without their launcher")
    assert node.engine_pids()
    process = node.start(wait=False).process
    assert process is not None

    def reached() -> bool:
        said = node.said()
        begun = moment == "has the lock" or "life" in said
        return said.get("pid") == process.pid and begun

    soon(reached, moment)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert not node.engine_pids()
    assert not node.pids()


def test_a_stop_while_the_agent_waits_for_its_next_try_ends_the_engines(
    make_node: MakeNode, models: Path
) -> None:
    node = make_node().start()
    node.deploy("tiny", models / "chat.gguf")
    assert node.process is not None
    _, most = resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE, (3, most))
    node.kill_role("agent")
    soon(lambda: "it is started again in 1.6 s" in node.log.read_text(), "it waits for long")
    resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE, (most, most))
    assert not node.pids("agent")
    node.process.send_signal(signal.SIGTERM)
    assert node.process.wait(20) == 0
    assert not node.engine_pids()


def test_a_node_that_lacks_descriptors_goes_on_and_tries_again(make_node: MakeNode) -> None:
    node = make_node("--disable-worker").start()
    assert node.process is not None
    _, most = resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE, (3, most))
    node.kill_role("gateway")
    soon(lambda: "Too many open files" in node.log.read_text(), "the reason is said")
    resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE, (most, most))
    soon(lambda: node.pids("gateway"), "it is started again")
    assert node.stop() == 0


@pytest.mark.slow
async def test_a_stop_after_a_restart_lets_streams_end(make_node: MakeNode, models: Path) -> None:
    node = make_node().start()
    threads = ["--threads=1", "--threads-batch=1"]
    node.deploy("slow", models / "slow.gguf", backend_parameters=threads)
    before = node.said()["life"]

    async def replaced() -> bool:
        return node.said().get("life") not in {None, before}

    async with running_streams(node, node.api_key(), "slow") as streams:
        assert node.process is not None
        node.process.send_signal(signal.SIGUSR2)
        await eventually(replaced, "a new launcher took its place")
        assert not any(stream.finish_reason for stream in streams), "too fast to test with"
        node.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(node.process.wait, 20) == 0


def test_a_restart_moves_the_port_unless_it_is_taken(make_node: MakeNode, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    node = make_node("--disable-worker", "--config-file", str(file))
    at = node.arguments.index("--port")
    del node.arguments[at : at + 2]
    file.write_text(f"port: {node.port}\n")
    node.start()
    pids = sorted(node.pids())
    other = free_ports(1)
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", other))
        taken.listen()
        file.write_text(f"port: {other}\n")
        refused = run("restart", "--data-dir", str(node.data_dir))
    assert refused.returncode == 1
    assert f"--port {other} is taken" in refused.stderr
    assert sorted(node.pids()) == pids
    assert node.ready()
    # Another port, then another address of the same port, which the old gateways still hold.
    for line, address in ((f"port: {other}", "127.0.0.1"), (f"port: {other}", "127.0.0.2")):
        file.write_text(f"{line}\nhost: {address}\n")
        done = run("restart", "--data-dir", str(node.data_dir))
        assert done.returncode == 0, done.stderr + node.log.read_text()
        ready = httpx.get(f"http://{address}:{other}/readyz", trust_env=False)
        assert ready.status_code == 200
    assert node.stop() == 0


def test_a_restart_cannot_move_the_data_directory(make_node: MakeNode, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    node = make_node("--disable-worker", "--config-file", str(file))
    at = node.arguments.index("--data-dir")
    del node.arguments[at : at + 2]
    file.write_text(f"data_dir: {node.data_dir}\n")
    node.start()
    file.write_text(f"data_dir: {tmp_path}\n")
    refused = run("restart", "--data-dir", str(node.data_dir))
    assert refused.returncode == 1
    assert "--data-dir cannot change" in refused.stderr
    assert node.stop() == 0


def test_every_role_that_is_killed_is_started_again(make_node: MakeNode) -> None:
    node = make_node().start()
    for role in ("server", "gateway", "agent", "relay"):
        old = node.kill_role(role)

        def replaced(role: str = role, old: int = old) -> bool:
            pids = node.pids(role)
            return old not in pids and len(pids) > 0

        soon(replaced, f"{role} is started again")

    own = trust.certificate_in((node.data_dir / WORKER_CERTIFICATE_FILE).read_text())
    tls = trust.exactly(own)

    def works() -> bool:
        with node.http() as http:
            try:
                workers = http.get("/v2/workers").json()["items"]
                healthy = httpx.get(f"https://127.0.0.1:{node.worker_port}/healthz", verify=tls)
            except httpx.HTTPError:
                return False
            return [one["state"] for one in workers] == ["ready"] and healthy.status_code == 200

    soon(works, "the node works again")


def test_a_restart_with_an_impossible_option_is_refused_and_changes_nothing(
    make_node: MakeNode, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("debug: false\n")
    node = make_node("--config-file", str(file)).start()
    pids = sorted(node.pids())
    file.write_text("prot: 80\n")
    for _ in range(2):  # the second says the same words
        refused = run("restart", "--data-dir", str(node.data_dir))
        assert refused.returncode == 1
        assert "did you mean port" in refused.stderr
    assert sorted(node.pids()) == pids
    file.write_text("debug: true\n")
    assert run("restart", "--data-dir", str(node.data_dir)).returncode == 0
    assert node.ready()


def test_a_hangup_reloads_the_log_level_and_stops_nothing(
    make_node: MakeNode, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("debug: false\n")
    node = make_node("--config-file", str(file)).start()
    assert node.process is not None
    pids = sorted(node.pids())
    said = "log level is now DEBUG"
    file.write_text("debug: true\n")
    node.process.send_signal(signal.SIGHUP)
    soon(lambda: node.log.read_text().count(said) == len(pids), "every process has heard it")
    old = node.kill_role("relay")
    soon(lambda: set(node.pids("relay")) - {old}, "the relay is started again")
    pids = sorted(node.pids())
    started = f"D relay __main__: started as pid {node.pids('relay')[0]}"
    soon(lambda: started in node.log.read_text(), "the level is that of the others")
    file.write_text("prot: 1\n")
    node.process.send_signal(signal.SIGHUP)
    soon(lambda: "not reloaded" in node.log.read_text(), "a mistake is said and costs nothing")
    assert sorted(node.pids()) == pids


def test_a_running_node_takes_in_what_needs_no_restart(make_node: MakeNode, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("worker_labels: [rack=1]\n")
    node = make_node("--config-file", str(file)).start()
    pids = sorted(node.pids())

    def reload(*more: str, status: int = 0) -> str:
        done = run("reload-config", "--data-dir", str(node.data_dir), *more)
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stderr

    def labels() -> dict[str, str]:
        with node.http() as http:
            (worker,) = http.get("/v2/workers").json()["items"]
        return dict(worker["labels"])

    def allowed() -> str:
        with node.http() as http:
            told = http.get("/v1/models", headers={"Origin": "https://app.example"}).headers
        return str(told.get("access-control-allow-origin"))

    def shown() -> dict[str, Any]:
        with node.http() as http:
            items = http.get("/v2/settings").json()["items"]
        return {one["key"]: one["value"] for one in items}

    assert labels()["rack"] == "1"
    assert allowed() == "None"
    assert reload() == "in effect: nothing new\n"
    file.write_text("worker_labels: [rack=2]\ngateway_concurrency: 1\nenable_cors: true\n")
    assert reload() == (
        "in effect: enable_cors, worker_labels\nneeds `gpustack restart`: gateway_concurrency\n"
    )
    soon(lambda: labels()["rack"] == "2", "the server has heard of the new label")
    soon(lambda: allowed() == "*", "the gateway answers pages of other origins")
    assert not shown()["debug"]
    assert "in effect: debug" in reload("--set", "debug=true")
    soon(lambda: shown()["debug"], "the settings that the server shows are those in effect")
    soon(lambda: node.log.read_text().count("log level is now DEBUG") == len(pids), "all hear it")
    file.write_text("prot: 1\n")
    assert "nothing was changed" in (said := reload(status=1))
    assert f"{file}, line 1: unknown key prot; did you mean port?" in said
    assert "--set: port needs a restart" in reload("--set", "port=81", status=1)
    assert "want true or false" in reload("--set", "debug=maybe", status=1)
    assert sorted(node.pids()) == pids


def test_the_first_password_is_in_a_file_and_must_be_changed(make_node: MakeNode) -> None:
    node = make_node("--force-auth-localhost").start()
    path = node.data_dir / "initial_admin_password"
    assert path.stat().st_mode & 0o777 == 0o600
    password = path.read_text().strip()
    with node.http(None) as browser:
        form = {"username": "admin", "password": password}
        assert browser.post("/auth/login", data=form).status_code == 204
        assert browser.get("/v2/models").json()["code"] == "password_change_required"
        assert browser.post("/v1/chat/completions", json={"model": "m"}).status_code == 403
        change = {"current_password": password, "new_password": "Changed-1"}
        assert browser.post("/auth/update-password", json=change).status_code == 204
        assert browser.get("/v2/models").status_code == 200


def test_a_given_first_password_need_not_be_changed(make_node: MakeNode) -> None:
    node = make_node("--bootstrap-password", "Given-pass-1").start()
    assert not (node.data_dir / "initial_admin_password").exists()
    with node.http(None) as browser:
        form = {"username": "admin", "password": "Given-pass-1"}
        assert browser.post("/auth/login", data=form).status_code == 204
        assert browser.get("/v2/models").status_code == 200


def test_files_with_secrets_are_their_owners_alone(node: Node) -> None:
    open_to_others = [
        path
        for path in node.data_dir.rglob("*")
        if path.is_file() and path.stat().st_mode & 0o077 and "log" not in path.parts
    ]
    assert open_to_others == []
    assert os.stat(node.data_dir).st_mode & 0o077 == 0
