import json
import logging
from dataclasses import replace

import pytest

from gpustack.schemas.instances import InstanceState
from gpustack.schemas.workers import Device, DeviceProblem, ProblemCode
from gpustack.worker.detectors.detection import Detection
from gpustack.worker.detectors.tools import Tools
from tests.support.control_plane import ControlPlane, assigned
from tests.support.worker_node import QUICK_RHYTHM, Node, eventually

RUNNING = InstanceState.RUNNING


async def test_a_new_worker_registers_once_and_then_shows_its_own_credential(
    node: Node, plane: ControlPlane
) -> None:
    async with node.agent():
        await plane.until(lambda: plane.heartbeats)
    async with node.agent():
        await plane.until(lambda: plane.announcements)
    assert len(plane.registrations) == 1
    (registration,) = plane.registrations
    assert registration.name == "worker-ä"
    assert registration.ip == "127.0.0.1"
    assert registration.port == node.api_port
    assert set(registration.labels) == {"os", "arch"}
    path = node.data_dir / "worker_credential"
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text()) == {
        "worker_id": 1,
        "credential": plane.credential,
        "agent_secret": plane.agent_secret,
        "cluster_id": "cluster-a",
    }


async def test_new_labels_and_reservations_are_told_by_the_same_run(
    node: Node, plane: ControlPlane
) -> None:
    async with node.agent():
        await plane.until(lambda: plane.heartbeats)
        (registration,) = plane.registrations
        plane.refuse["PUT /v2/workers/1/registration"] = 503
        node.reload({"worker_labels": ["rack=7"], "system_reserved": {"ram": 3, "vram": 0.5}})
        await plane.until(lambda: plane.refused)
        del plane.refuse["PUT /v2/workers/1/registration"]
        await plane.until(lambda: plane.announcements)
    told = plane.announcements[-1]
    assert told.labels["rack"] == "7"
    assert set(told.labels) == {"os", "arch", "rack"}
    assert told.system_reserved_ram_bytes == 3 * 1024**3
    assert told.system_reserved_vram_bytes == 1024**3 // 2
    assert told.run_id == registration.run_id


async def test_heartbeats_carry_machine_boot_and_the_run_that_was_announced(
    node: Node, plane: ControlPlane
) -> None:
    async with node.agent():
        await plane.until(lambda: len(plane.heartbeats) >= 3)
    (registration,) = plane.registrations
    for beat in plane.heartbeats:
        assert beat.machine_id == registration.machine_id
        assert beat.boot_id == registration.boot_id
        assert beat.run_id == registration.run_id


async def test_the_status_is_told_at_once_and_then_again_and_again(
    node: Node, plane: ControlPlane
) -> None:
    async with node.agent():
        await plane.until(lambda: len(plane.statuses) >= 2)
    assert plane.statuses[0].memory_total_bytes > 0
    assert plane.statuses[0].cpu_count > 0


async def test_a_status_that_the_server_refuses_is_said_once(
    node: Node, plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    plane.refuse["PUT /v2/workers/1/status"] = 422
    async with node.agent():
        await plane.until(lambda: plane.refused >= 3)
    said = [one for one in caplog.messages if "the server refuses what this worker has" in one]
    assert len(said) == 1


async def test_declared_devices_are_told_and_the_disks_of_the_data_directory(
    node: Node, plane: ControlPlane
) -> None:
    file = node.folder / "node.yaml"
    card = "{name: H200, vendor: NVIDIA, memory_total_bytes: 141GiB}"
    file.write_text(f"resources: {{cpu_count: 64, gpu_devices: [{card}]}}\n")
    node.flags["config_file"] = str(file)
    async with node.agent():
        await plane.until(lambda: plane.statuses)
    (status, *_) = plane.statuses
    assert status.cpu_count == 64
    (device,) = status.gpu_devices
    assert (device.name, device.type, device.memory_total_bytes) == ("H200", "cuda", 141 << 30)
    assert any(node.data_dir.is_relative_to(disk.mount_point) for disk in status.disks)


async def test_what_happens_to_a_device_is_told_at_once(node: Node, plane: ControlPlane) -> None:
    class Card:
        vendor = "test"
        problems: tuple[DeviceProblem, ...] = ()

        def look(self, tools: Tools) -> list[Device]:
            card = Device(index=0, vendor="test", memory_total_bytes=1)
            return [card.model_copy(update={"problems": list(self.problems)})]

    card = Card()
    rare = replace(QUICK_RHYTHM, status_s=600.0)
    async with node.agent(rhythm=rare, detection=Detection([card])):
        await plane.until(lambda: plane.statuses)
        card.problems = (DeviceProblem(code=ProblemCode.ECC, message="2 errors"),)
        await plane.until(lambda: plane.statuses[-1].gpu_devices[0].problems)
        card.problems = ()
        await plane.until(lambda: not plane.statuses[-1].gpu_devices[0].problems)
    assert [len(one.gpu_devices[0].problems) for one in plane.statuses] == [0, 1, 0]


async def test_a_heartbeat_that_another_machine_contests_is_said_once(
    node: Node, plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    plane.refuse["PUT /v2/workers/1/heartbeat"] = 409
    with caplog.at_level(logging.WARNING):
        async with node.agent():
            await plane.until(lambda: plane.refused >= 4)
    said = [r for r in caplog.records if "another machine or process" in r.getMessage()]
    assert len(said) == 1


async def test_a_credential_that_the_server_lost_is_replaced_once(
    node: Node, plane: ControlPlane
) -> None:
    async with node.agent():
        await plane.until(lambda: plane.heartbeats)
        plane.credential = "lost"
        await plane.until(lambda: len(plane.registrations) == 2)
        beats = len(plane.heartbeats)
        await plane.until(lambda: len(plane.heartbeats) > beats)
        await plane.assign(assigned(1, node.spec()))
        await plane.until_state(1, RUNNING)
        plane.credential = "lost again"
        await plane.until(lambda: plane.refused > 10)
        assert len(plane.registrations) == 2
        assert len(node.engines()) == 1


async def test_a_server_of_another_cluster_is_refused_and_nothing_stops(
    node: Node, plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    async with node.agent():
        await plane.assign(assigned(1, node.spec()))
        status = await plane.until_state(1, RUNNING)
        known = (node.data_dir / "worker_credential").read_text()
        plane.cluster_id = "cluster-b"
        plane.credential = "of another cluster"
        plane.instances.clear()
        await plane.until(lambda: len(plane.registrations) == 2)
        refused = plane.refused
        await plane.until(lambda: plane.refused > refused + 1)
        assert len(plane.registrations) == 2  # it asks again, and does not register again
        assert node.engines() == [status.pid]
        assert (node.data_dir / "worker_credential").read_text() == known
    sentence = "is of cluster cluster-b, this worker of cluster cluster-a"
    assert any(sentence in record.getMessage() for record in caplog.records)


async def test_a_wrong_join_token_is_said_and_tried_again(
    node: Node, plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    plane.refuse["POST /v2/workers/register"] = 401
    async with node.agent():
        await plane.until(lambda: plane.refused >= 2)
        plane.refuse.clear()
        await plane.until(lambda: plane.heartbeats)
    assert any("cannot join the cluster" in r.getMessage() for r in caplog.records)


async def test_a_watch_that_breaks_is_resumed_and_loses_nothing(
    node: Node, plane: ControlPlane
) -> None:
    async with node.agent():
        await plane.assign(assigned(1, node.spec()))
        await plane.until_state(1, RUNNING)
        watches = plane.watches
        plane.break_watches()
        await plane.assign(assigned(2, node.spec()))
        await plane.until_state(2, RUNNING)
        assert plane.watches > watches
        assert plane.states(1) == ["starting", "running"]


async def test_nothing_secret_is_logged(
    node: Node, plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        async with node.agent(rhythm=QUICK_RHYTHM):
            await plane.assign(assigned(1, node.spec("exit=1")))
            await plane.until_state(1, InstanceState.ERROR)
            await plane.until(lambda: plane.heartbeats)
            await eventually(lambda: node.log(1))
    secrets = [plane.credential, plane.agent_secret, plane.instances[1].secret or "-"]
    assert not [secret for secret in secrets if secret in caplog.text + node.log(1)]
