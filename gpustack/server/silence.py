"""PURE: what is said of silent workers and of what is on them: why, and what comes next."""

from collections.abc import Sequence
from datetime import UTC, datetime

from gpustack.server.db.tables import Instance, Worker


def of_worker(worker: Worker) -> str:
    """Of a silent one."""
    if worker.lost:
        return f"{_since(worker)}; what is on it is replaced"
    return f"{_since(worker)}; what is on it is replaced{_at_the_end(worker)}"


def of_instance(
    row: Instance, workers: Sequence[Worker], replacement: str | None = None
) -> str | None:
    """Of an instance; None: it is in reach.

    Args:
        workers: that it is on; the first is the one that answers for it.
        replacement: name of the instance that has its place.
    """
    silent = next((worker for worker in workers if worker.silent), None)
    if silent is None:
        if not row.lost:
            return None
        return f"{workers[0].name} is heard of again, and has not said yet how this instance is"
    why = f"{silent.name} is {_since(silent)}"
    if row.deleting:
        return f"{why}; the end of this instance is waited for{_until(silent)}"
    if not row.lost:
        return f"{why}; another instance takes this one's place{_at_the_end(silent)}"
    if replacement is None:
        return f"{why}; this instance stays if {silent.name} returns, and it is wanted then"
    return (
        f"{why}; replaced by {replacement}; this instance stays if it still runs when "
        f"{silent.name} returns, and {replacement} does not run by then"
    )


def _since(worker: Worker) -> str:
    return f"silent since {_shown(worker.heartbeat_at)}" if worker.heartbeat_at else "silent"


def _at_the_end(worker: Worker) -> str:
    end = worker.grace_ends_at
    return f" at {_shown(end)}, unless it is heard of before" if end else " after the grace period"


def _until(worker: Worker) -> str:
    return f" until {_shown(worker.grace_ends_at)}" if worker.grace_ends_at else ""


def _shown(time: datetime) -> str:
    aware = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    return f"{aware:%Y-%m-%d %H:%M:%S} UTC"
