from gpustack.forward.metrics import text
from gpustack.schemas.workers import Device, DeviceProblem, Disk, ProblemCode, WorkerStatus
from gpustack.worker.metrics import machine

GIB = 1 << 30


def samples(status: WorkerStatus) -> dict[str, float]:
    """Sample -> value, as Prometheus would read them, of the machine alone."""
    _, body = text(machine(status))
    lines = [line for line in body.decode().splitlines() if line.startswith("gpustack:")]
    pairs = (line.rpartition(" ") for line in lines)
    return {name.removeprefix("gpustack:worker_node_"): float(value) for name, _, value in pairs}


def test_host_disks_and_devices_are_told_with_their_health() -> None:
    well = Device(
        index=0, name="H200", vendor="NVIDIA", type="cuda", uuid="GPU-0",
        memory_total_bytes=141 * GIB, memory_used_bytes=3 * GIB, utilization_percent=50.0,
        temperature_celsius=61.0, power_watts=412.5,
    )  # fmt: skip
    lost = DeviceProblem(code=ProblemCode.LOST, message="it was there")
    silent = Device(
        index=0, name="910B", vendor="Ascend", type="cann", memory_total_bytes=GIB, problems=[lost]
    )
    status = WorkerStatus(
        os="linux", arch="amd64", cpu_count=4, memory_total_bytes=8 * GIB, cpu_percent=12.5,
        memory_used_bytes=GIB, uptime_s=77, gpu_devices=[well, silent],
        disks=[Disk(mount_point="/data", total_bytes=100, used_bytes=7)],
    )  # fmt: skip
    h200 = '{index="0",name="H200",type="cuda",uuid="GPU-0"}'
    npu = '{index="0",name="910B",type="cann",uuid=""}'
    assert samples(status) == {
        "cpu_cores": 4,
        "cpu_utilization_rate": 12.5,
        "memory_total_bytes": 8 * GIB,
        "memory_used_bytes": GIB,
        "uptime_seconds": 77,
        'filesystem_total_bytes{mountpoint="/data"}': 100,
        'filesystem_used_bytes{mountpoint="/data"}': 7,
        f"gpu_utilization_rate{h200}": 50,
        f"gpu_temperature_celsius{h200}": 61,
        f"gpu_power_used_watts{h200}": 412.5,
        f"gram_total_bytes{h200}": 141 * GIB,
        f"gram_used_bytes{h200}": 3 * GIB,
        f"gpu_healthy{h200}": 1,
        f"gram_total_bytes{npu}": GIB,
        f"gram_used_bytes{npu}": 0,
        f"gpu_healthy{npu}": 0,
    }
