"""The ports that Prometheus reads, and who may."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

import gpustack
from tests.e2e.conftest import MakeNode
from tests.support.node import Node
from tests.support.wait import soon

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module", params=["embedded", "disabled"])
def served(make_node: MakeNode, models: Path, request: pytest.FixtureRequest) -> Iterator[Node]:
    node = make_node("--gateway-mode", request.param).start()
    node.deploy("org/tiny", models / "chat.gguf")
    yield node
    assert node.stop() == 0


def values(port: int, **headers: str) -> dict[str, float]:
    """Sample -> value, as Prometheus would read them."""
    answer = httpx.get(f"http://127.0.0.1:{port}/metrics", headers=headers, trust_env=False)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=")
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_the_server_counts_what_the_cluster_has_and_what_was_asked(served: Node) -> None:
    body = {"model": "org/tiny", "messages": MESSAGES, "max_tokens": 5}
    with served.http() as http, http.stream("GET", "/v2/watch?kinds=models") as watch:
        lines = watch.iter_lines()
        next(lines)
        assert http.post("/v1/chat/completions", json=body).status_code == 200
        asked = 'gpustack_requests_total{model="org/tiny",status="200"}'
        soon(lambda: values(served.metrics_port).get(asked) == 1, "the request is counted")
        seen = values(served.metrics_port)
    assert seen['gpustack_completion_tokens_total{model="org/tiny"}'] == 5
    assert seen['gpustack_prompt_tokens_total{model="org/tiny"}'] > 0
    assert seen[f'gpustack_build_info{{version="{gpustack.__version__}"}}'] == 1
    for kind, state in (("models", "ready"), ("instances", "running"), ("workers", "ready")):
        assert seen[f'gpustack_{kind}{{state="{state}"}}'] == 1
        assert sum(v for k, v in seen.items() if k.startswith(f"gpustack_{kind}{{")) == 1
    (age,) = (v for k, v in seen.items() if k.startswith("gpustack_worker_heartbeat_age_seconds"))
    assert 0 <= age < 60
    assert seen["gpustack_watches"] >= 3  # gateway, agent and ours
    assert seen["process_resident_memory_bytes"] > 1e6


def test_the_worker_says_what_its_engines_do_and_use(served: Node) -> None:
    seen = values(served.worker_metrics_port)
    assert seen['gpustack_engines{state="running"}'] == 1
    assert sum(v for k, v in seen.items() if k.startswith("gpustack_engines{")) == 1
    (restarts,) = (v for k, v in seen.items() if k.startswith("gpustack_engine_restarts"))
    assert restarts == 0
    ((name, used),) = ((k, v) for k, v in seen.items() if k.startswith("gpustack_engine_memory"))
    assert re.fullmatch(r'gpustack_engine_memory_bytes\{instance="org/tiny-\w{5}"\}', name)
    resident = sum(psutil.Process(pid).memory_info().rss for pid in served.engine_pids())
    assert used == pytest.approx(resident, rel=0.5)
    soon(
        lambda: values(served.worker_metrics_port).get("gpustack:worker_node_cpu_cores", 0) >= 1,
        "the host was looked at",
    )


def test_from_elsewhere_a_key_is_needed(served: Node) -> None:
    foreign = ({"Host": "node.example"}, {"Origin": "http://evil.example"}, {"Via": "1.1 proxy"})
    url = f"http://127.0.0.1:{served.metrics_port}/metrics"
    for headers in foreign:
        assert httpx.get(url, headers=headers, trust_env=False).status_code == 401
        wrong = headers | {"Authorization": "Bearer wrong"}
        assert httpx.get(url, headers=wrong, trust_env=False).status_code == 401
        key = {"Authorization": f"Bearer {served.api_key()}"}
        assert "gpustack_watches" in values(served.metrics_port, **headers, **key)
        url_of_worker = f"http://127.0.0.1:{served.worker_metrics_port}/metrics"
        refused = httpx.get(url_of_worker, headers=headers | key, trust_env=False)
        assert refused.status_code == 401
        assert "do not know API keys yet" in refused.json()["message"]


def test_a_credential_of_the_products_parts_is_no_key(served: Node) -> None:
    url = f"http://127.0.0.1:{served.metrics_port}/metrics"
    for name in ("gateway_credential",):
        secret = (served.data_dir / name).read_text().strip()
        headers = {"Host": "node.example", "Authorization": f"Bearer {secret}"}
        assert httpx.get(url, headers=headers, trust_env=False).status_code == 403


def test_ports_are_not_opened_where_nobody_wants_them(make_node: MakeNode) -> None:
    node = make_node("--disable-metrics", "--disable-worker-metrics").start()
    for port in (node.metrics_port, node.worker_metrics_port):
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
    assert node.stop() == 0


def test_a_gateway_without_its_watch_is_counted(served: Node) -> None:
    """The one process of `--gateway-mode disabled` cannot lose itself."""
    port, gateways = served.metrics_port, served.pids("gateway")
    states = ("connected", "disconnected")

    def are(connected: int, disconnected: int) -> bool:
        seen = values(port)
        found = [seen[f'gpustack_gateways{{state="{state}"}}'] for state in states]
        return found == [connected, disconnected]

    count = len(gateways) or 1
    soon(lambda: are(count, 0), "every gateway is connected")
    if gateways:
        assert served.process is not None
        served.process.send_signal(signal.SIGSTOP)  # else it would start another at once
        os.kill(gateways[0], signal.SIGKILL)
        soon(lambda: are(count - 1, 1), "the one that is gone is missed")
        served.process.send_signal(signal.SIGCONT)
        soon(lambda: are(count, 0), "another has taken its place", within_s=30)
