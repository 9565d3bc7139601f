"""Taking a worker out of service: two workers with real engines, and requests without a pause."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import MakeNode
from tests.support.node import Node
from tests.support.streams import load, running_streams
from tests.support.wait import soon

pytestmark = pytest.mark.slow

ONE_THREAD = ["--threads=1", "--threads-batch=1"]


@pytest.fixture(scope="module")
def second(make_node: MakeNode, node: Node) -> Node:
    """A worker beside the server's own."""
    joined = make_node("--worker-labels", "place=second", name="second", server=node).start()
    soon(lambda: [one["state"] for one in workers(node)] == ["ready"] * 2, "both are ready")
    return joined


def workers(node: Node) -> list[dict[str, Any]]:
    with node.http() as http:
        return list(http.get("/v2/workers").json()["items"])


def command(node: Node, *words: str) -> tuple[list[str], dict[str, str]]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GPUSTACK_")}
    program = [sys.executable, "-m", "gpustack", "workers", *words]
    return program, kept | {"GPUSTACK_DATA_DIR": str(node.data_dir)}


def run(node: Node, *words: str) -> str:
    program, env = command(node, *words)
    done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def places(node: Node, *models: int) -> set[str]:
    """The workers that these models' instances are on; each is running."""
    found = [one for model in models for one in node.instances(model)]
    assert {one["state"] for one in found} == {"running"}, found
    return {one["worker_name"] for one in found}


async def test_all_leave_a_worker_that_is_drained_and_no_request_notices(
    node: Node, second: Node, models: Path
) -> None:
    key, leaves = node.api_key(), second.data_dir.name
    chat = node.deploy("chat", models / "chat.gguf", replicas=2, backend_parameters=ONE_THREAD)
    slow = node.deploy("slow", models / "slow.gguf", replicas=2, backend_parameters=ONE_THREAD)
    (own,) = [one["name"] for one in workers(node) if one["name"] != leaves]
    assert places(node, chat) == places(node, slow) == {own, leaves}
    async with load(node, key, "chat", 1) as failures, running_streams(node, key, "slow", 2):
        program, env = command(
            node, "drain", leaves, "--reason", "new disk", "--wait", "--timeout", "3m"
        )
        drain = await asyncio.create_subprocess_exec(
            *program, env=env, stderr=asyncio.subprocess.PIPE
        )
        _, said = await drain.communicate()
        text = said.decode()
        assert drain.returncode == 0, text
        assert "is to take its place" in text
        assert text.endswith(f"{leaves} is drained: nothing is left on it\n")
    assert failures == []
    assert second.engine_pids() == []
    assert places(node, chat) == places(node, slow) == {own}
    header, *rows = run(node, "list").splitlines()
    (row,) = [row for row in rows if f" {leaves} " in row]
    assert row[header.index("SCHEDULING") :].startswith("drained ")
    assert row.endswith("new disk")
    assert f"{leaves} takes new instances" in run(node, "uncordon", leaves)
    third = node.deploy("third", models / "chat.gguf", backend_parameters=ONE_THREAD)
    assert places(node, third) == {leaves}
    assert places(node, chat) == places(node, slow) == {own}


def test_a_drain_that_moves_no_further_ends_with_what_waits_and_why(
    node: Node, second: Node, models: Path
) -> None:
    there, leaves = {"place": "second"}, second.data_dir.name
    model = node.deploy(
        "bound", models / "chat.gguf", worker_selector=there, backend_parameters=ONE_THREAD
    )
    (bound,) = node.instances(model)
    (own,) = [one["name"] for one in workers(node) if one["name"] != leaves]
    program, env = command(node, "drain", leaves, "--wait")
    done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert f"1 instance of {leaves} cannot move now: " in last
    assert f"{bound['name']} stays on {leaves}, for there is no room elsewhere" in last
    assert f"{own} has no place, the model wants place=second" in last
    assert places(node, model) == {leaves}
    run(node, "uncordon", leaves)
