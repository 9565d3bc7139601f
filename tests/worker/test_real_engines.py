"""The built-in engine under an agent: real models, real failures, and what is said of them."""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from demo import tiny_gguf
from gpustack.schemas.instances import InstanceState, InstanceStatus
from gpustack.schemas.models import Source, VersionSpec
from gpustack.worker.reconcile import Policy
from tests.support.control_plane import ControlPlane, assigned
from tests.support.worker_node import QUICK_LIMITS, Node

pytestmark = pytest.mark.slow

RUNNING, ERROR = InstanceState.RUNNING, InstanceState.ERROR
LIMITS = replace(QUICK_LIMITS, start_s=60, patience_s=2, first_s=30)


@pytest.fixture
def bare(node: Node) -> Node:
    """A worker without an installed engine: the built-in one is what it runs."""
    (node.data_dir / "bin/llama-server").unlink()
    return node


def spec(model: Path, **more: Any) -> VersionSpec:
    facts = {"source": Source.LOCAL_PATH, "local_path": os.fspath(model), **more}
    return VersionSpec.model_validate({"backend_parameters": ["--threads=1"], **facts})


async def test_each_kind_of_model_runs_once_a_request_of_its_kind_was_answered(
    bare: Node, plane: ControlPlane, tmp_path: Path
) -> None:
    chat = tiny_gguf.write(tmp_path / "chat.gguf", "chat")
    embed = tiny_gguf.write(tmp_path / "embed.gguf", "embed")
    rerank = tiny_gguf.write(tmp_path / "rerank.gguf", "rerank")
    async with bare.agent(limits=LIMITS):
        await plane.assign(assigned(1, spec(chat)))
        await plane.assign(assigned(2, spec(embed, categories=["embedding"])))
        await plane.assign(assigned(3, spec(rerank, categories=["reranker"])))
        await plane.assign(assigned(4, spec(embed, backend_parameters=["--embeddings"])))
        for id in (1, 2, 3, 4):
            await plane.until_state(id, RUNNING, limit_s=60)
        # It listens and answers /health; nobody could use it.
        await plane.assign(assigned(5, spec(rerank)))
        unfit = await plane.until_state(5, ERROR, limit_s=60)
        assert unfit.state_message.startswith(
            "/health answers, but the first request (POST /v1/completions) got 500: the current "
            "context does not support logits computation. skipping: this model ranks or embeds; "
            "give it the category reranker or embedding\n"
        )
        assert RUNNING not in plane.states(5)


async def failed(node: Node, plane: ControlPlane, spec: VersionSpec) -> InstanceStatus:
    async with node.agent(limits=LIMITS):
        await plane.assign(assigned(1, spec))
        return await plane.until_state(1, ERROR, limit_s=60)


async def test_a_wrong_argument_is_named(bare: Node, plane: ControlPlane, tmp_path: Path) -> None:
    model = tiny_gguf.write(tmp_path / "chat.gguf")
    status = await failed(bare, plane, spec(model, backend_parameters=["--ctx-sise=3"]))
    assert status.state_message == (
        "the engine exited with code 2 before it answered: it does not know the argument "
        "--ctx-sise; correct the model's backend parameters\n"
        "error: the built-in engine does not know --ctx-sise; did you mean --ctx-size?"
    )


async def test_a_broken_model_is_named(bare: Node, plane: ControlPlane, tmp_path: Path) -> None:
    broken = tiny_gguf.write_broken(tmp_path / "broken.gguf")
    status = await failed(bare, plane, spec(broken))
    assert status.state_message.startswith(
        "the engine exited with code 1 before it answered: the model's file is broken, or is none "
        "of this engine's; remove it and have it fetched again\n"
    )


async def test_memory_that_does_not_suffice_is_named(
    bare: Node, plane: ControlPlane, tmp_path: Path
) -> None:
    model = tiny_gguf.write(tmp_path / "chat.gguf", context=2**22)
    wrapper = bare.data_dir / "bin/llama-server"
    command = f'exec {sys.executable} -m gpustack.worker.llama_server "$@"'
    wrapper.write_text(f"#!/bin/bash\nulimit -v 2500000\n{command}\n")
    wrapper.chmod(0o755)
    wanted = spec(model, backend_parameters=["--ctx-size=4000000", "--parallel=1"])
    status = await failed(bare, plane, wanted)
    assert status.state_message.startswith(
        "the engine exited with code 1 before it answered: the worker's memory does not suffice; "
        "lower the context length or the parallel requests, or give it a worker with more memory\n"
    )


async def test_an_engine_that_stands_still_is_restarted_with_evidence(
    bare: Node, plane: ControlPlane, tmp_path: Path
) -> None:
    model = tiny_gguf.write(tmp_path / "chat.gguf")
    limits = replace(LIMITS, patience_s=1)
    async with bare.agent(limits=limits, policy=Policy(first_s=0.2)):
        await plane.assign(assigned(1, spec(model)))
        first = await plane.until_state(1, RUNNING, limit_s=60)
        so_far = len(plane.reports)
        assert first.pid
        os.kill(first.pid, signal.SIGSTOP)
        stuck = await plane.until_state(1, ERROR, after=so_far, limit_s=60)
        assert stuck.state_message.startswith("the engine did not answer 3 times in a row")
        again = await plane.until_state(1, RUNNING, after=so_far, limit_s=60)
        assert (again.pid != first.pid, again.restart_count) == (True, 1)


async def test_an_engine_busy_with_a_long_prompt_is_left_alone(
    bare: Node, plane: ControlPlane, tmp_path: Path
) -> None:
    tokens = 10_000
    model = tiny_gguf.write(tmp_path / "chat.gguf", context=2**14, layers=8)
    limits = replace(LIMITS, look_s=0.2, stuck_s=3, probe_s=0.1, patience_s=10)
    small = ["--threads=1", "--ctx-size=16384", "--parallel=1", "--batch-size=64"]
    async with bare.agent(limits=limits):
        await plane.assign(assigned(1, spec(model, backend_parameters=small)))
        first = await plane.until_state(1, RUNNING, limit_s=60)
        bearer = {"Authorization": f"Bearer {plane.instances[1].secret}"}
        body = {"prompt": "one " * tokens, "max_tokens": 1}
        began = time.monotonic()
        async with httpx.AsyncClient(timeout=120, headers=bearer) as client:
            url = f"http://127.0.0.1:{first.port}/v1/completions"
            answer = await client.post(url, json=body)
        assert answer.status_code == 200
        assert answer.json()["usage"]["prompt_tokens"] > tokens
        assert time.monotonic() - began > limits.stuck_s  # else this test says nothing
        assert plane.states(1)[-1] is RUNNING


def waiting_connections() -> str:
    return Path("/proc/net/tcp").read_text()


async def test_an_engine_starts_again_on_its_only_port_among_connections_that_have_ended(
    bare: Node, plane: ControlPlane, tmp_path: Path
) -> None:
    port = int(bare.flags["service_port_range"].partition("-")[0])
    bare.flags["service_port_range"] = f"{port}-{port}"
    model = tiny_gguf.write(tmp_path / "chat.gguf")
    async with bare.agent(limits=LIMITS, policy=Policy(first_s=0.2)):
        await plane.assign(assigned(1, spec(model)))
        first = await plane.until_state(1, RUNNING, limit_s=60)
        bearer = {"Authorization": f"Bearer {plane.instances[1].secret}", "Connection": "close"}
        async with httpx.AsyncClient(headers=bearer) as client:
            for _ in range(5):
                await client.get(f"http://127.0.0.1:{port}/health")
        assert f" 0100007F:{port:04X} " in waiting_connections()
        so_far = len(plane.reports)
        assert first.pid
        os.kill(first.pid, signal.SIGKILL)
        again = await plane.until_state(1, RUNNING, after=so_far, limit_s=60)
        assert (again.port, again.restart_count) == (port, 1)
