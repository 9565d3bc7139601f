"""Processors and memory of this machine, or of the container that we are in."""

import os
import platform as machine
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import psutil

from gpustack.schemas.workers import WorkerStatus

#: Words that others use for the same architecture.
_ARCH = {"x86_64": "amd64", "aarch64": "arm64"}

#: cgroup v1 writes "no limit" as the largest multiple of a page below 2**63.
_NO_LIMIT = 1 << 60


def os_name() -> str:
    return machine.system().lower()


def arch() -> str:
    word = machine.machine().lower()
    return _ARCH.get(word, word)


def status() -> WorkerStatus:
    """This machine without its accelerators; the processor's use is since the last call."""
    total, used = memory()
    return WorkerStatus(
        os=os_name(),
        arch=arch(),
        kernel=machine.release(),
        cpu_count=_cpus(),
        memory_total_bytes=total,
        cpu_percent=psutil.cpu_percent(),
        memory_used_bytes=used,
    )


def memory() -> tuple[int, int]:
    """Total and used, bytes, of this machine or of the container that we are in."""
    memory = psutil.virtual_memory()
    total, used = memory.total, memory.total - memory.available
    limit = memory_limit(_text("/proc/self/cgroup"), _text)
    if limit is not None and limit[0] < total:
        total, used = limit
    return total, min(used, total)


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
    for line in own_groups.splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            root, names = "/sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = "/sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the path may be the host's, or "/": look at every level there is.
        own = PurePosixPath(path.lstrip("/"))
        for level in (own, *own.parents):
            folder = f"{root}/{level}" if str(level) != "." else root
            limit = read(f"{folder}/{names[0]}").strip()
            if limit.isdigit() and int(limit) < _NO_LIMIT:
                used = read(f"{folder}/{names[1]}").strip()
                cache = _field(read(f"{folder}/memory.stat"), names[2])
                found.append((int(limit), max(0, int(used or 0) - cache)))
    return min(found, default=None)


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
