"""64 instances on one worker: what its agent costs, and that they can be rolled."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.worker import LIMITS, cpu_s, resident_mb
from tests.support import fake_engine
from tests.support.node import Node
from tests.support.streams import load
from tests.support.wait import eventually, soon

INSTANCES, PORTS = 64, 128
#: How many of them are rolled.
ROLLED = [
    pytest.param(16, 10.0, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    pytest.param(64, 60.0, marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
]


@pytest.mark.parametrize(("rolled", "idle_s"), ROLLED)
async def test_a_worker_of_64_instances_is_cheap_and_rolls_them_without_a_failed_request(
    tmp_path: Path, rolled: int, idle_s: float
) -> None:
    node = Node(tmp_path / "node", engine_ports=PORTS)
    fake_engine.install(node.data_dir / "bin")
    node.start()
    try:
        kept = deploy(node, "kept", INSTANCES - rolled) if rolled < INSTANCES else None
        model_id = deploy(node, "rolled", rolled)
        costs_little(node, idle_s)
        untouched = kept and node.instances(kept)
        await rolls(node, model_id, rolled)
        assert (kept and node.instances(kept)) == untouched
        assert len(node.engine_pids()) == INSTANCES
    finally:
        node.kill()


def deploy(node: Node, name: str, replicas: int) -> int:
    spec = fake_engine.spec(node.data_dir)
    body = {"name": name, "replicas": replicas} | spec.model_dump(mode="json", exclude_unset=True)
    with node.http() as http:
        answer = http.post("/v2/models", json=body)
        assert answer.status_code == 201, answer.text
        model_id = int(answer.json()["id"])
    running = ["running"] * replicas
    soon(
        lambda: [one["state"] for one in node.instances(model_id)] == running,
        f"{replicas} instances of {name} run",
        within_s=180,
    )
    return model_id


def costs_little(node: Node, seconds: float) -> None:
    """Of a core and of memory, while nothing happens."""
    (agent,) = node.pids("agent")
    before, began = cpu_s(agent), time.monotonic()
    time.sleep(seconds)  # this long is looked at; no state is waited for
    percent = 100 * (cpu_s(agent) - before) / (time.monotonic() - began)
    assert percent <= LIMITS["agent, idle, % of one core"]
    assert resident_mb(agent) <= LIMITS["agent, resident MB"]


async def rolls(node: Node, model_id: int, count: int) -> None:
    """Each is replaced, the new one first, and no request fails."""
    fewest = count

    async def is_over() -> bool:
        nonlocal fewest
        found = node.instances(model_id)
        ready = Counter(one["model_generation"] for one in found if one["state"] == "running")
        fewest = min(fewest, ready.total())
        return ready == {2: count} and len(found) == count

    async with load(node, node.api_key(), "rolled", 1) as failures:
        with node.http() as http:
            change: Any = {"env": {"FAKE": "say=again"}}
            assert http.patch(f"/v2/models/{model_id}", json=change).status_code == 200
        await eventually(is_over, "every instance is of the new version", within_s=15 * count)
    assert failures == []
    assert fewest == count, "an old one went before the new one ran"
    assert all(process_said_again(node, one["id"]) for one in node.instances(model_id))


def process_said_again(node: Node, instance_id: int) -> bool:
    return "again" in (node.log_dir / "serve" / f"{instance_id}.log").read_text()
