"""Devices of the whole cluster: what workers say they have, and how much of it is used."""

from typing import Any

import httpx
import pytest

from gpustack.scheduler.snapshot import Snapshot
from gpustack.server.db import tables
from gpustack.server.views import worker_view
from tests.server.conftest import Plane

GIB = 1024**3
DEVICES = "/v2/gpu-devices"


def device(index: int, **more: Any) -> dict[str, Any]:
    facts = {"index": index, "name": "H100", "vendor": "NVIDIA", "type": "cuda"}
    return facts | {"uuid": f"GPU-{index}", "memory_total_bytes": 80 * GIB} | more


async def listed(http: httpx.AsyncClient, **asked: Any) -> list[dict[str, Any]]:
    answer = await http.get(DEVICES, params=asked)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["items"])


async def ids(http: httpx.AsyncClient, **asked: Any) -> list[str]:
    return [one["id"] for one in await listed(http, **asked)]


@pytest.fixture
async def cluster(plane: Plane) -> Plane:
    nvidia = [device(0, memory_used_bytes=20 * GIB, utilization_percent=50.0), device(1)]
    await plane.worker("a", gpu_devices=nvidia)
    npu = device(0, name="Ascend 910B", vendor="Huawei", type="", memory_total_bytes=64 * GIB)
    await plane.worker("rack:b", gpu_devices=[npu])
    await plane.worker("without")
    return plane


async def test_devices_are_known_by_worker_type_and_index(cluster: Plane) -> None:
    admin = await cluster.admin()
    assert await ids(admin) == ["a:cuda:0", "a:cuda:1", "rack:b:huawei:0"]
    one = (await admin.get(f"{DEVICES}/rack:b:huawei:0")).json()
    assert (one["worker_id"], one["worker_name"], one["worker_ip"]) == (2, "rack:b", "127.0.0.1")
    assert (one["index"], one["vendor"], one["name"]) == (0, "Huawei", "Ascend 910B")


async def test_a_device_shows_all_that_its_worker_says_of_it(plane: Plane) -> None:
    told = {
        "driver_version": "580.65.06", "runtime_version": "13.0", "architecture": "Hopper",
        "compute_capability": "9.0", "parent_uuid": "GPU-parent",
        "network": {
            "status": "up", "ip": "10.0.0.1", "netmask": "", "mac": "", "gateway": "",
            "interface": "", "mtu": 4096,
        },
        "problems": [{"code": "ecc", "message": "2 memory errors could not be corrected"}],
    }  # fmt: skip
    measured = {
        "temperature_celsius": 61.5, "power_watts": 412.25,
        "processes": [{"pid": 77, "memory_bytes": 5 * GIB, "instance_id": 3}],
    }  # fmt: skip
    await plane.worker("a", gpu_devices=[device(0, memory_unified=True, **told, **measured)])
    await plane.app.state.heartbeats.write(plane.db)
    (one,) = await listed(await plane.admin())
    assert {key: one[key] for key in told} == told
    assert (one["temperature"], one["power_watts"]) == (61.5, 412.25)
    assert one["processes"] == measured["processes"]
    assert one["memory"]["is_unified_memory"]


async def test_a_worker_shows_its_host_and_what_is_used_of_it(plane: Plane) -> None:
    disk = {"mount_point": "/data", "total_bytes": 100 * GIB, "used_bytes": 7 * GIB}
    host = {
        "os_version": "Debian GNU/Linux 12 (bookworm)", "swap_total_bytes": 9, "swap_used_bytes": 4,
        "uptime_s": 4711, "disks": [disk],
    }  # fmt: skip
    await plane.worker("a", **host)
    admin = await plane.admin()
    (before,) = (await admin.get("/v2/workers")).json()["items"]
    assert (before["status"]["os_version"], before["status"]["disks"]) == (host["os_version"], [])
    await plane.app.state.heartbeats.write(plane.db)
    (worker,) = (await admin.get("/v2/workers")).json()["items"]
    assert {key: worker["status"][key] for key in host} == host


@pytest.mark.parametrize("name", ["a:cuda:2", "a:rocm:0", "b:cuda:0", "a", "a:cuda:x", "a:cuda:²"])
async def test_a_device_that_is_not_there_is_not_found(cluster: Plane, name: str) -> None:
    answer = await (await cluster.admin()).get(f"{DEVICES}/{name}")
    assert answer.status_code == 404
    assert f"there is no GPU device {name}" in answer.json()["message"]


async def test_devices_are_filtered_searched_and_sorted(cluster: Plane) -> None:
    admin = await cluster.admin()
    assert await ids(admin, worker_name="a", sort_by="-index") == ["a:cuda:1", "a:cuda:0"]
    assert await ids(admin, vendor="Huawei") == ["rack:b:huawei:0"]
    assert await ids(admin, search="RACK") == ["rack:b:huawei:0"]
    assert await ids(admin, search="h100", worker_id=1, perPage=1, page=2) == ["a:cuda:1"]
    assert (await ids(admin, sort_by="memory_total"))[0] == "rack:b:huawei:0"
    assert (await ids(admin, sort_by="-worker_name"))[0] == "rack:b:huawei:0"


async def test_a_device_shows_what_is_used_and_what_instances_claim_of_it(cluster: Plane) -> None:
    admin = await cluster.admin()
    (before, *_) = await listed(admin)
    assert (before["memory"]["used"], before["core"]["utilization_rate"]) == (0, None)
    await cluster.app.state.heartbeats.write(cluster.db)  # as every ten seconds
    spec = {"name": "m", "source": "local_path", "local_path": "/m.gguf", "replicas": 0}
    await admin.post("/v2/models", json=spec)
    async with cluster.db.write() as session:
        instance = tables.Instance(
            name="m-abcde", model_id=1, version_id=1, worker_id=1, deleting=True,
            claim={"ram_bytes": 1, "vram_bytes": {"0": 8 * GIB}},
        )  # fmt: skip
        session.add(instance)
        await session.flush()
        part = {"vram_bytes": {"0": 2 * GIB, "1": GIB}}
        its = instance.key()[1]
        session.add(tables.Member(instance_id=its, rank=0, worker_id=1, claim=part))
    first, second, third = await listed(admin)
    assert first["memory"] == {
        "total": 80 * GIB, "used": 20 * GIB, "allocated": 10 * GIB, "utilization_rate": 25.0,
        "is_unified_memory": False,
    }  # fmt: skip
    assert first["core"] == {"utilization_rate": 50.0}
    assert (second["memory"]["allocated"], third["memory"]["allocated"]) == (GIB, 0)
    (worker, *_) = (await admin.get("/v2/workers")).json()["items"]
    assert worker["status"]["gpu_devices"][0]["memory_used_bytes"] == 20 * GIB


async def test_a_device_shows_no_claims_on_another_vendors_with_its_index(plane: Plane) -> None:
    await plane.worker("a", gpu_devices=[device(0), device(0, vendor="AMD", type="rocm")])
    admin = await plane.admin()
    spec = {"name": "m", "source": "local_path", "local_path": "/m.gguf", "replicas": 0}
    await admin.post("/v2/models", json=spec)
    async with plane.db.write() as session:
        claim = {"device_type": "rocm", "vram_bytes": {"0": GIB}}
        session.add(
            tables.Instance(
                name="m-abcde", model_id=1, version_id=1, worker_id=1, deleting=True, claim=claim
            )
        )
    allocated = {one["type"]: one["memory"]["allocated"] for one in await listed(admin)}
    assert allocated == {"cuda": 0, "rocm": GIB}


async def test_what_an_older_agent_said_is_shown_and_its_devices_are_well(plane: Plane) -> None:
    await plane.worker("a", gpu_devices=[device(0)])
    async with plane.db.write() as session:
        row = await session.get(tables.Worker, 1)
        assert row is not None
        known = ("index", "name", "vendor", "type", "uuid", "memory_total_bytes")
        row.facts = {
            "os": "linux", "arch": "amd64", "cpu_count": 2, "memory_total_bytes": 8 * GIB,
            "gpu_devices": [{name: device(0)[name] for name in known}],
        }  # fmt: skip
        row.devices_used = [{"memory_used_bytes": GIB, "utilization_percent": None}]
        row.host_used = None
    admin = await plane.admin()
    (one,) = await listed(admin)
    assert (one["problems"], one["processes"], one["memory"]["used"]) == ([], [], GIB)
    (worker,) = (await admin.get("/v2/workers")).json()["items"]
    assert worker["status"]["gpu_devices"][0]["problems"] == []
    async with plane.db.read() as session:
        row = await session.get(tables.Worker, 1)
    assert row is not None
    (node,) = Snapshot.of([worker_view(row)], []).nodes
    assert list(node.usable_vram_bytes) == [("cuda", 0)]


async def test_devices_go_with_what_the_worker_says_and_with_the_worker(cluster: Plane) -> None:
    admin = await cluster.admin()
    other = await cluster.worker("c", gpu_devices=[device(0), device(1), device(2)])
    await other.report(gpu_devices=[device(1), device(3)])
    assert await ids(admin, worker_name="c") == ["c:cuda:1", "c:cuda:3"]
    await other.report()
    assert await ids(admin, worker_name="c") == []
    await admin.delete("/v2/workers/1")
    assert await ids(admin) == ["rack:b:huawei:0"]
