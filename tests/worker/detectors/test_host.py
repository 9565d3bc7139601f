import os
import shutil
from pathlib import Path

from gpustack.worker.detectors.detection import Detection
from gpustack.worker.detectors.host import cpu_limit, disks, memory_limit

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


def test_a_quota_of_processors_counts_at_every_level() -> None:
    files = {
        "/sys/fs/cgroup/user.slice/app/cpu.max": "max 100000\n",
        "/sys/fs/cgroup/user.slice/cpu.max": "150000 100000\n",
        "/sys/fs/cgroup/cpu.max": "400000 100000\n",
    }
    assert cpu_limit(V2, lambda path: files.get(path, "")) == 1.5
    files = {
        "/sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "-1\n",
        "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
        "/sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000\n",
        "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    assert cpu_limit(V1, lambda path: files.get(path, "")) == 0.5
    assert cpu_limit(V1, lambda path: "") is None


def test_the_file_systems_of_folders_are_told_once_also_before_the_folders_are_there(
    tmp_path: Path,
) -> None:
    (disk,) = disks([tmp_path, tmp_path / "not" / "yet"])
    assert tmp_path.is_relative_to(disk.mount_point)
    assert Path(disk.mount_point).is_mount()
    assert 0 < disk.used_bytes <= disk.total_bytes == shutil.disk_usage(tmp_path).total
    there = {one.mount_point for one in disks([tmp_path, Path("/proc"), Path("/dev")])}
    assert {"/proc", "/dev"} < there


async def test_this_machine_is_told_by_name_with_what_it_uses(tmp_path: Path) -> None:
    status = await Detection([], folders=[tmp_path]).look()
    assert status.os_version
    assert status.kernel == os.uname().release
    assert status.uptime_s > 0
    assert 0 <= status.swap_used_bytes <= status.swap_total_bytes
    assert [one.mount_point for one in status.disks] == [
        one.mount_point for one in disks([tmp_path])
    ]
    assert not {"disks", "uptime_s", "swap_used_bytes"} & status.facts().keys()


async def test_this_machine_has_processors_and_memory() -> None:
    detection = Detection([])
    status = await detection.look()
    assert status.cpu_count >= 1
    assert 0 < status.memory_used_bytes < status.memory_total_bytes
    assert status.facts() == (await detection.look()).facts()
