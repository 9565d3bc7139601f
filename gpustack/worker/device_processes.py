"""Whose engine a process is that a driver names."""

from collections.abc import Collection, Mapping
from typing import Final

from gpustack.lib import platform
from gpustack.worker.supervisor.records import HOME_VARIABLE, UID_VARIABLE, Records

#: Where the devices of all vendors are: a process that uses one has such a file open.
NODES: Final = (
    "/dev/nvidia",
    "/dev/dxg",
    "/dev/kfd",
    "/dev/dri/",
    "/dev/davinci",
    "/dev/hisi",
    "/dev/mtgpu",
    "/dev/iluvatar",
    "/dev/bi_driver",
    "/dev/cambricon",
)


def owners(
    records: Records,
    pids: Collection[int],
    *,
    sees_all: bool | None = None,
    nodes: tuple[str, ...] = NODES,
) -> Mapping[int, int]:
    """Pid -> the instance whose engine's it is; those that are nobody's are not in it. Blocks.

    A process is an engine's if it is in its process group, or carries its mark: some engines give
    their parts sessions of their own. In a container, drivers may tell the host's numbers; one of
    ours could have the same one by chance, so there it must have a device open as well.

    Args:
        sees_all: pids are the machine's, not a container's; None: find out.
    """
    groups: dict[int, int] = {}
    marks: dict[str, int] = {}
    for record in records.all():
        marks[record.uid] = record.instance_id
        if record.is_alive and record.pid is not None:
            groups[record.pid] = record.instance_id
    home = str(records.home)
    if sees_all is None:
        sees_all = platform.sees_all_processes()
    found = {}
    for pid in pids:
        instance_id = groups.get(platform.process_group(pid) or 0)
        if instance_id is None:
            environment = platform.process_environment(pid)
            if environment.get(HOME_VARIABLE) == home:
                instance_id = marks.get(environment.get(UID_VARIABLE, ""))
        if instance_id is not None and (sees_all or _has_open(pid, nodes)):
            found[pid] = instance_id
    return found


def _has_open(pid: int, nodes: tuple[str, ...]) -> bool:
    return any(file.startswith(nodes) for file in platform.open_files(pid))
