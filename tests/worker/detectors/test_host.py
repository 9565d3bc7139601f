from gpustack.worker.detectors.detection import Detection
from gpustack.worker.detectors.host import memory_limit

V2 = "0::/user.slice/app\n"
V1 = "12:cpu,cpuacct:/docker/x\n5:memory:/docker/x\n"


def test_the_tightest_limit_of_all_levels_counts() -> None:
    files = {
        "/sys/fs/cgroup/user.slice/app/memory.max": "max\n",
        "/sys/fs/cgroup/user.slice/app/memory.current": "10\n",
        "/sys/fs/cgroup/user.slice/memory.max": "1000\n",
        "/sys/fs/cgroup/user.slice/memory.current": "300\n",
        "/sys/fs/cgroup/user.slice/memory.stat": "anon 100\ninactive_file 120\n",
        "/sys/fs/cgroup/memory.max": "5000\n",
    }
    assert memory_limit(V2, lambda path: files.get(path, "")) == (1000, 180)


def test_without_a_limit_there_is_none() -> None:
    assert memory_limit(V2, lambda path: "max\n") is None
    assert memory_limit("", lambda path: "") is None
    assert memory_limit(V1, lambda path: "9223372036854771712\n") is None


def test_the_limits_of_cgroup_v1_are_read_too() -> None:
    files = {
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": "2000",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes": "700",
        "/sys/fs/cgroup/memory/memory.stat": "total_inactive_file 100",
    }
    assert memory_limit(V1, lambda path: files.get(path, "")) == (2000, 600)


async def test_this_machine_has_processors_and_memory() -> None:
    detection = Detection()
    status = await detection.look()
    assert status.cpu_count >= 1
    assert 0 < status.memory_used_bytes < status.memory_total_bytes
    assert status.facts() == (await detection.look()).facts()
