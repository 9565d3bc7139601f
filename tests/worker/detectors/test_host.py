import asyncio
import time
from pathlib import Path

import pytest

from gpustack.schemas.workers import Device
from gpustack.worker.detectors import detect
from gpustack.worker.detectors.host import memory_limit
from gpustack.worker.detectors.tools import Tools

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
    status = await detect()
    assert status.cpu_count >= 1
    assert 0 < status.memory_used_bytes < status.memory_total_bytes
    assert status.facts() == (await detect()).facts()


class Tool:
    """A vendor's detector for tests: its command prints lines of "index name bytes"."""

    vendor = "test"

    def __init__(self, *command: str) -> None:
        self.command = command

    def look(self, tools: Tools) -> list[Device]:
        if not tools.has(self.command[0]):
            return []
        rows = (line.split() for line in tools.run(*self.command).splitlines())
        return [
            Device(index=int(index), name=name, vendor="test", memory_total_bytes=int(size))
            for index, name, size in rows
        ]


async def test_devices_come_from_the_tools_that_are_there(tmp_path: Path) -> None:
    good = Tool("sh", "-c", "echo 0 card 1024; echo 1 card 2048")
    absent = Tool(str(tmp_path / "no-such-tool"))
    broken, odd = Tool("sh", "-c", "exit 3"), Tool("sh", "-c", "echo what is this")
    status = await detect([absent, broken, odd, good])
    assert [device.memory_total_bytes for device in status.gpu_devices] == [1024, 2048]


async def test_a_tool_that_hangs_holds_up_nobody() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        await detect([Tool("sleep", "2"), Tool("sleep", "2")], limit_s=0.2)
    await asyncio.sleep(0)
    assert time.monotonic() - began < 1
