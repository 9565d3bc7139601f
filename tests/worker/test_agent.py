import asyncio
import os
import re
import signal
import socket
from dataclasses import replace

import psutil
import pytest

from gpustack.lib import platform
from gpustack.schemas.instances import InstanceState
from gpustack.schemas.models import Source
from gpustack.worker.reconcile import Policy
from tests.support.control_plane import ControlPlane, assigned
from tests.support.fake_hub import fake_hub
from tests.support.worker_node import QUICK_LIMITS, Node, eventually

RUNNING, ERROR, GONE = InstanceState.RUNNING, InstanceState.ERROR, InstanceState.GONE


async def test_an_instance_is_started_and_reported_state_by_state(
    node: Node, plane: ControlPlane
) -> None:
    async with node.agent():
        await plane.assign(assigned(1, node.spec()))
        status = await plane.until_state(1, RUNNING)
        assert plane.states(1) == ["starting", "running"]
        assert 'asked /v1/completions {"model":"m",' in node.log(1)
        assert node.engines() == [status.pid]
        assert status.restart_count == 0


async def test_gone_is_reported_when_no_process_of_the_engine_is_left(
    node: Node, plane: ControlPlane
) -> None:
    async with node.agent():
        await plane.assign(assigned(1, node.spec("stubborn")))
        await plane.until_state(1, RUNNING)
        assert len(node.engines()) == 2  # the engine and a child; both ignore SIGTERM
        await plane.change(1, deleting=True, generation=2)
        await plane.until_state(1, GONE)
        assert node.engines() == []
        assert not list((node.data_dir / "engines").iterdir())
    assert plane.states(1) == ["starting", "running", "gone"]


async def test_an_instance_that_the_server_deletes_is_stopped(
    node: Node, plane: ControlPlane
) -> None:
    async with node.agent():
        await plane.assign(assigned(1, node.spec()))
        await plane.until_state(1, RUNNING)
        await plane.remove(1)
        await plane.until_state(1, GONE)
        assert node.engines() == []


async def test_a_killed_engine_is_started_again_after_a_pause(
    node: Node, plane: ControlPlane
) -> None:
    async with node.agent(policy=Policy(first_s=0.3)):
        await plane.assign(assigned(1, node.spec()))
        first = await plane.until_state(1, RUNNING)
        so_far = len(plane.reports)
        killed_at = asyncio.get_running_loop().time()
        assert first.pid
        os.kill(first.pid, signal.SIGKILL)
        failed = await plane.until_state(1, ERROR, after=so_far)
        assert "signal 9 (SIGKILL)" in failed.state_message
        again = await plane.until_state(1, RUNNING, after=so_far)
        assert asyncio.get_running_loop().time() - killed_at >= 0.3
        assert (again.restart_count, again.pid != first.pid) == (1, True)
        assert plane.states(1) == ["starting", "running", "error", "starting", "running"]


async def test_a_broken_engine_ends_in_error_with_its_own_last_words(
    node: Node, plane: ControlPlane
) -> None:
    async with node.agent(policy=Policy(first_s=0.05, limit_s=60)):
        await plane.assign(assigned(1, node.spec("exit=3")))
        failed = await plane.until_state(1, ERROR)
        assert failed.state_message == (
            "the engine exited with code 3 before it answered\n" + last_lines(node.log(1))
        )
        assert "error: cannot load model: magic mismatch" in failed.state_message


def last_lines(log: str) -> str:
    return re.sub(r"\x1b\[\d*m", "", log).strip()


async def test_after_three_failures_alike_only_a_new_generation_starts_it_soon(
    node: Node, plane: ControlPlane
) -> None:
    broken = node.folder / "broken"
    broken.touch()
    async with node.agent(policy=Policy(first_s=0.05, limit_s=60)):
        await plane.assign(assigned(1, node.spec(f"exit-if={broken}")))
        await plane.until(lambda: any("3 times alike" in s.state_message for _, s in plane.reports))
        broken.unlink()
        starts = plane.states(1).count(InstanceState.STARTING)
        assert starts == 3
        await plane.change(1, generation=2)
        status = await plane.until_state(1, RUNNING)
        assert (status.restart_count, status.observed_generation) == (3, 2)


async def test_an_instance_that_must_not_restart_stays_in_error(
    node: Node, plane: ControlPlane
) -> None:
    async with node.agent(policy=Policy(first_s=0.01)):
        await plane.assign(assigned(1, node.spec("exit=1"), restart_on_error=False))
        await plane.assign(assigned(2, node.spec("exit=1")))
        await plane.until_state(1, ERROR)
        await plane.until(lambda: plane.states(2).count(ERROR) == 2)
        assert plane.states(1) == ["starting", "error"]


async def test_an_engine_that_no_longer_answers_is_started_again(
    node: Node, plane: ControlPlane
) -> None:
    deaf = node.folder / "deaf"
    async with node.agent():
        await plane.assign(assigned(1, node.spec(f"deaf-if={deaf} say=loaded-layers")))
        first = await plane.until_state(1, RUNNING)
        deaf.touch()
        failed = await plane.until_state(1, ERROR)
        assert failed.state_message.startswith("the engine did not answer 3 times in a row")
        assert "loaded-layers" in failed.state_message
        deaf.unlink()
        again = await plane.until_state(1, RUNNING, after=len(plane.reports))
        assert again.pid != first.pid
        assert node.engines() == [again.pid]


async def test_a_port_taken_in_between_is_no_crash(node: Node, plane: ControlPlane) -> None:
    async with node.agent(policy=Policy(first_s=60)):
        await plane.assign(assigned(1, node.spec("delay=0.3")))
        await plane.until(lambda: plane.reports and plane.reports[-1][1].port)
        port = plane.reports[-1][1].port
        with socket.create_server(("127.0.0.1", port or 0)):
            status = await plane.until_state(1, RUNNING)
        assert (status.port != port, status.restart_count) == (True, 0)
        assert ERROR not in plane.states(1)


async def test_a_used_up_port_range_is_an_error_that_names_the_option(
    node: Node, plane: ControlPlane
) -> None:
    port = int(str(node.flags["service_port_range"]).partition("-")[0])
    node.flags["service_port_range"] = f"{port}-{port}"
    async with node.agent():
        await plane.assign(assigned(1, node.spec()))
        await plane.until_state(1, RUNNING)
        await plane.assign(assigned(2, node.spec()))
        failed = await plane.until_state(2, ERROR)
        assert "--service-port-range" in failed.state_message
        await plane.remove(1)
        assert (await plane.until_state(2, RUNNING)).port == port


async def test_a_missing_file_is_an_error_that_names_file_and_worker(
    node: Node, plane: ControlPlane
) -> None:
    async with node.agent():
        await plane.assign(assigned(1, node.spec(local_path="/nowhere/m.gguf")))
        failed = await plane.until_state(1, ERROR)
        assert failed.state_message == "file not found: /nowhere/m.gguf on worker worker-ä"


async def test_a_file_of_the_hub_is_fetched_first_and_the_progress_told(
    node: Node, plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.repos["org/m"] = {"m.gguf": b"GGUF" * 100_000}
        hub.cuts = [100_000]
        remote = {"source": Source.HUGGING_FACE, "huggingface_repo_id": "org/m"}
        async with node.agent():
            spec = node.spec(huggingface_filename="m.gguf", **remote)
            await plane.assign(assigned(1, spec))
            await plane.until_state(1, RUNNING)
            assert plane.states(1) == ["downloading", "starting", "running"]
            progress = [s.download_progress for _, s in plane.reports if s.download_progress]
            assert all(0 < share <= 100 for share in progress)
            assert str(node.data_dir / "cache") in node.log(1)


async def test_an_engine_version_that_is_not_installed_is_an_error_that_says_where(
    node: Node, plane: ControlPlane
) -> None:
    async with node.agent():
        await plane.assign(assigned(1, node.spec(backend="llama-box", backend_version="v9")))
        failed = await plane.until_state(1, ERROR)
        assert f"put it as llama-box_v9 into {node.data_dir / 'bin'}" in failed.state_message


async def test_an_instance_that_the_server_does_not_know_is_stopped(
    node: Node, plane: ControlPlane
) -> None:
    async with node.agent():
        await plane.assign(assigned(1, node.spec("delay=0.2")))
        await plane.until_state(1, InstanceState.STARTING)
        del plane.instances[1]  # the server forgets it without a word on the watch
        await plane.until_state(1, GONE)
        assert node.engines() == []


async def test_stop_ends_every_engine_and_says_so(node: Node, plane: ControlPlane) -> None:
    async with node.agent():
        for id in (1, 2, 3):
            await plane.assign(assigned(id, node.spec("stubborn" if id == 2 else "")))
        for id in (1, 2, 3):
            await plane.until_state(id, RUNNING)
    assert node.engines() == []
    assert {id for id, status in plane.reports if status.state is ERROR} == {1, 2, 3}


async def test_secrets_are_in_files_of_their_owner_only_and_nowhere_else(
    node: Node, plane: ControlPlane
) -> None:
    os.environ["GPUSTACK_TOKEN"] = "join-token"
    try:
        async with node.agent():
            await plane.assign(assigned(1, node.spec()))
            status = await plane.until_state(1, RUNNING)
            secret = plane.instances[1].secret
            assert secret
            assert status.pid
            holders = []
            for path in node.data_dir.rglob("*"):
                if path.is_file() and "bin" not in path.parts:
                    if secret in path.read_text():
                        holders.append(path.name)
                    assert path.stat().st_mode & 0o077 == 0 or path.name == "agent.lock", path
            (key_file,) = (node.data_dir / "engines").glob("*.key")
            assert sorted(holders) == sorted(["desired.json", key_file.name])
            command = psutil.Process(status.pid).cmdline()
            assert secret not in " ".join(command)
            environment = platform.process_environment(status.pid)
            assert "GPUSTACK_TOKEN" not in environment
            assert secret not in environment.values()
    finally:
        del os.environ["GPUSTACK_TOKEN"]


async def test_no_zombie_is_left_of_an_engine(node: Node, plane: ControlPlane) -> None:
    async with node.agent():
        await plane.assign(assigned(1, node.spec()))
        status = await plane.until_state(1, RUNNING)
        await plane.remove(1)
        await plane.until_state(1, GONE)
        await eventually(lambda: not os.path.exists(f"/proc/{status.pid}"))


@pytest.mark.parametrize("restarts", [True, False])
async def test_a_range_used_up_is_a_reason_and_a_port_that_comes_free_ends_it(
    node: Node, plane: ControlPlane, restarts: bool
) -> None:
    first_port = node.flags["service_port_range"].partition("-")[0]
    node.flags["service_port_range"] = f"{first_port}-{first_port}"
    async with node.agent(policy=Policy(first_s=60)):
        await plane.assign(assigned(1, node.spec()))
        await plane.until_state(1, RUNNING)
        await plane.assign(assigned(2, node.spec(), restart_on_error=restarts))
        waiting = await plane.until_state(2, InstanceState.ERROR)
        assert waiting.state_message == (
            f"no free port in {first_port}-{first_port}: 1 of 1 are held by engines of this "
            "worker; widen --service-port-range"
        )
        await plane.change(1, deleting=True)
        started = await plane.until_state(2, RUNNING)  # long before a minute is over
        assert (started.port, started.restart_count) == (int(first_port), 0)


async def test_a_port_is_not_given_away_while_anything_of_its_engine_lives(
    node: Node, plane: ControlPlane
) -> None:
    first_port = node.flags["service_port_range"].partition("-")[0]
    node.flags["service_port_range"] = f"{first_port}-{first_port}"
    limits = replace(QUICK_LIMITS, stop_s=0.5)
    async with node.agent(policy=Policy(first_s=0.05, limit_s=0.05), limits=limits):
        await plane.assign(assigned(1, node.spec("stubborn away")))
        first = await plane.until_state(1, RUNNING)
        assert first.pid
        os.kill(first.pid, signal.SIGKILL)  # a child of it, in a group of its own, lives on
        await plane.remove(1)
        await plane.assign(assigned(2, node.spec()))
        await eventually(lambda: first.pid not in node.engines())
        (left,) = node.engines()
        while left in (seen := node.engines()):
            assert seen == [left]
            await asyncio.sleep(0.01)
        await plane.until_state(2, RUNNING)
