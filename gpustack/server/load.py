"""How busy all workers are together: now, and in each minute of the last hour."""

import time
from typing import Any

from sqlalchemy import BigInteger, case, cast, delete, func, select
from sqlmodel import col

from gpustack.server.db.database import Database, ReadSession
from gpustack.server.db.tables import Device, LoadSample, Worker

SAMPLE_EVERY_S = 60.0
KEPT_MINUTES = 60


def this_minute() -> int:
    return int(time.time() // 60)


async def current_load(session: ReadSession, minute: int) -> LoadSample:
    """The load of the workers that are heard of, averaged over machines and over devices."""
    has = (col(Device.worker_id) == col(Worker.id),)
    devices = select(func.count()).where(*has).correlate(Worker).scalar_subquery()
    vram = select(func.sum(Device.memory_total_bytes)).where(*has).correlate(Worker)
    measures_gpus = col(Worker.gpu_percent).is_not(None)
    facts = col(Worker.facts)
    ram = cast(facts["memory_total_bytes"].as_string(), BigInteger)
    query: Any = select(
        func.avg(Worker.cpu_percent),
        func.sum(Worker.memory_used_bytes),
        func.sum(ram),
        func.sum(col(Worker.gpu_percent) * devices),
        func.sum(case((measures_gpus, devices), else_=0)),
        func.sum(Worker.vram_used_bytes),
        func.sum(vram.scalar_subquery()),
    ).where(col(Worker.silent).is_(False), facts.is_not(None))
    cpu, ram_used, ram_total, busy, of, vram_used, vram_total = (await session.exec(query)).one()
    return LoadSample(
        minute=minute,
        cpu=None if cpu is None else float(cpu),
        ram=_percent(ram_used, ram_total),
        gpu=float(busy) / float(of) if of else None,
        vram=_percent(vram_used, vram_total),
    )


def _percent(used: int | None, total: int | None) -> float | None:
    return 100 * float(used or 0) / float(total) if total else None


async def sample(db: Database, minute: int | None = None) -> None:
    """Keep the load of a minute (None: of this one), once, and forget what is too old."""
    minute = this_minute() if minute is None else minute
    async with db.write() as session:
        await session.exec(
            delete(LoadSample).where(col(LoadSample.minute) <= minute - KEPT_MINUTES)
        )
        if await session.get(LoadSample, minute) is None:
            session.add(await current_load(session, minute))
