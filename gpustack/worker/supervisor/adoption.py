"""Finding the engines that an earlier agent of this data directory left running."""

import logging
from dataclasses import dataclass

from gpustack.lib import platform
from gpustack.worker.supervisor.groups import groups_by_uid, groups_of_tools
from gpustack.worker.supervisor.records import UID_VARIABLE, Record, Records

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stray:
    """Processes of an engine that is to be no more.

    Attributes:
        record: whose port they may hold; removed once they are gone. None: nobody has one.
    """

    groups: frozenset[int]
    record: Record | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What an earlier agent left.

    Attributes:
        alive: engines to adopt; each record has a pid, one per instance.
        dead: records whose engine is gone, and nothing else runs for the instance.
        strays: what is left of others: of engines that nobody has a record of, whose first process
            is gone, or whose instance has another; and of vendors' tools.
    """

    alive: list[Record]
    dead: list[Record]
    strays: list[Stray]


def find(records: Records) -> Found:
    """Look for engines by their records and by what their environment says.

    A process counts as an engine only if pid, start time and boot agree; a pid alone is used again
    by others. A record without a pid is completed with the process that carries its uid.
    """
    records.tidy()
    groups = groups_by_uid(records.home)
    alive: dict[int, Record] = {}
    gone: list[Record] = []
    for record in records.all():
        found = record if record.is_alive else _leader(record, groups.get(record.uid, set()))
        if found is None or record.instance_id in alive:
            gone.append(record)
            continue
        if found is not record:
            records.put(found)
        alive[record.instance_id] = found
        groups.pop(record.uid, None)
    strays = []
    for record in gone:
        left = groups.pop(record.uid, set())
        if record.is_alive and record.pid is not None:
            left.add(record.pid)  # it leads its group, whatever its environment says by now
        if left:
            strays.append(Stray(frozenset(left), record))
        else:
            records.remove(record.uid)
    strays += [Stray(frozenset(left)) for left in groups.values()]
    if tools := groups_of_tools(records.home):
        strays.append(Stray(frozenset(tools)))
    dead = [record for record in gone if record.instance_id not in alive]
    return Found(list(alive.values()), dead, strays)


def _leader(record: Record, groups: set[int]) -> Record | None:
    """A record without a pid, with the engine's first process in it; None: there is none."""
    started = [
        (ticks, pid)
        for pid in groups
        if (ticks := platform.start_ticks(pid))
        and platform.process_environment(pid).get(UID_VARIABLE) == record.uid
    ]
    if record.pid is not None or not started:
        return None
    # Not by their numbers: these begin anew one day, and a child may have the smaller one.
    ticks, pid = min(started)
    first = {"pid": pid, "start_ticks": ticks, "boot_id": platform.boot_id()}
    return record.model_copy(update=first)
