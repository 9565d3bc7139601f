"""What the agent shows of its engines to who may ask."""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from gpustack.schemas.engines import Engine, Engines
from gpustack.worker.control import Control
from gpustack.worker.reconcile import Observed
from gpustack.worker.supervisor.engine_log import log_path
from gpustack.worker.supervisor.records import Records


async def engines(control: Control, records: Records, log_dir: Path) -> Engines:
    """Every engine that there is, by instance."""
    return await asyncio.to_thread(_engines, control.observed(), control.names, records, log_dir)


def _engines(
    observed: Mapping[int, Observed], wanted: Mapping[int, str], records: Records, log_dir: Path
) -> Engines:
    names = {record.instance_id: record.instance_name for record in records.all()} | dict(wanted)
    return Engines(
        [
            Engine(
                instance_id=id,
                instance_name=names.get(id, ""),
                phase=seen.phase,
                pid=seen.pid,
                port=seen.port,
                restart_count=seen.restart_count,
                age_s=_age_s(seen.pid),
                log_bytes=_size(log_path(log_dir, id)),
            )
            for id, seen in sorted(observed.items())
        ]
    )


def _age_s(pid: int | None) -> float | None:
    """Both times are of one clock, so it does not matter what that clock says."""
    if pid is None:
        return None
    with suppress(psutil.Error):
        return max(0.0, round(time.time() - psutil.Process(pid).create_time(), 1))
    return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
