"""Processors, memory and file systems of this machine, or of the container that we are in."""

import math
import os
import platform as machine
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

import psutil

from gpustack.schemas.workers import Disk, WorkerStatus

#: Words that others use for the same architecture.
_ARCH = {"x86_64": "amd64", "aarch64": "arm64"}

#: cgroup v1 writes "no limit" as the largest multiple of a page below 2**63.
_NO_LIMIT = 1 << 60


def os_name() -> str:
    return machine.system().lower()


def os_version() -> str:
    """As people call it, such as "Debian GNU/Linux 12 (bookworm)"; in a container, its own."""
    if os_name() == "darwin":
        return f"macOS {machine.mac_ver()[0]}"
    try:
        return machine.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return f"{machine.system()} {machine.release()}"


def arch() -> str:
    word = machine.machine().lower()
    return _ARCH.get(word, word)


def status() -> WorkerStatus:
    """This machine without accelerators and disks; the processor's use is since the last call."""
    total, used = memory()
    swap = psutil.swap_memory()
    return WorkerStatus(
        os=os_name(),
        os_version=os_version(),
        arch=arch(),
        kernel=machine.release(),
        cpu_count=_cpus(),
        memory_total_bytes=total,
        swap_total_bytes=swap.total,
        cpu_percent=psutil.cpu_percent(),
        memory_used_bytes=used,
        swap_used_bytes=swap.used,
        uptime_s=_uptime_s(),
    )


def memory() -> tuple[int, int]:
    """Total and used, bytes, of this machine or of the container that we are in."""
    memory = psutil.virtual_memory()
    total, used = memory.total, memory.total - memory.available
    limit = memory_limit(_text("/proc/self/cgroup"), _text)
    if limit is not None and limit[0] < total:
        total, used = limit
    return total, min(used, total)


def disks(folders: Iterable[Path]) -> list[Disk]:
    """The file systems that these folders lie on, or will, each once. May hang with one of them."""
    found: dict[str, Disk] = {}
    for folder in folders:
        there = next((each for each in (folder, *folder.parents) if each.exists()), None)
        if there is None:
            continue
        mount_point = _mount_point(there.resolve())
        if mount_point not in found:
            usage = psutil.disk_usage(mount_point)
            found[mount_point] = Disk(
                mount_point=mount_point, total_bytes=usage.total, used_bytes=usage.used
            )
    return list(found.values())


def _mount_point(folder: Path) -> str:
    while not folder.is_mount() and folder != folder.parent:
        folder = folder.parent
    return str(folder)


def _uptime_s() -> int:
    if (clock := getattr(time, "CLOCK_BOOTTIME", None)) is not None:
        return int(time.clock_gettime(clock))
    return int(time.time() - psutil.boot_time())


def _cpus() -> int:
    own = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        own = len(os.sched_getaffinity(0))
    limit = cpu_limit(_text("/proc/self/cgroup"), _text)
    return own if limit is None else max(1, min(own, math.ceil(limit)))


def cpu_limit(own_groups: str, read: Callable[[str], str]) -> float | None:
    """The tightest quota of our control groups, in processors; None: there is none. Pure.

    Args:
        own_groups, read: as for `memory_limit`.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (cpu.max: "$MAX $PERIOD", "max" for
    none) and scheduler/sched-bwc.rst (cpu.cfs_quota_us, -1 for none, and cpu.cfs_period_us).
    """
    found = []
    for folder, is_v2 in _levels(own_groups, "cpu"):
        if is_v2:
            quota, _, period = read(f"{folder}/cpu.max").strip().partition(" ")
        else:
            quota = read(f"{folder}/cpu.cfs_quota_us").strip()
            period = read(f"{folder}/cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit() and int(period):
            found.append(int(quota) / int(period))
    return min(found, default=None)


def memory_limit(own_groups: str, read: Callable[[str], str]) -> tuple[int, int] | None:
    """The tightest memory limit of our control groups and what is used of it, bytes.

    None: there is no limit. Pure, but for `read`.

    Args:
        own_groups: content of /proc/self/cgroup, lines of "id:controllers:path".
        read: content of a file, "" if there is none.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (memory.max, memory.current, "max" for
    none) and cgroup-v1/memory.rst (memory.limit_in_bytes, memory.usage_in_bytes). The page cache
    that the kernel would give back (inactive_file) does not count as used.
    """
    found: list[tuple[int, int]] = []
    for folder, is_v2 in _levels(own_groups, "memory"):
        if is_v2:
            names = ("memory.max", "memory.current", "inactive_file")
        else:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit = read(f"{folder}/{names[0]}").strip()
        if limit.isdigit() and int(limit) < _NO_LIMIT:
            used = read(f"{folder}/{names[1]}").strip()
            cache = _field(read(f"{folder}/memory.stat"), names[2])
            found.append((int(limit), max(0, int(used or 0) - cache)))
    return min(found, default=None)


def _levels(own_groups: str, controller: str) -> Iterator[tuple[str, bool]]:
    """Folders in which a limit may be, and whether they are of cgroup v2.

    Inside a container our path may be the host's, or "/": each level that there is counts.
    """
    for line in own_groups.splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            root = "/sys/fs/cgroup"
        elif controller in controllers.split(","):
            root = f"/sys/fs/cgroup/{controller}"
        else:
            continue
        own = PurePosixPath(path.lstrip("/"))
        for level in (own, *own.parents):
            yield f"{root}/{level}" if str(level) != "." else root, controllers == ""


def _field(stat: str, name: str) -> int:
    for line in stat.splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdigit():
            return int(value)
    return 0


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
