"""/v2/gpu-devices: GPUs and NPUs of all workers."""

import re
from collections.abc import Iterable, Sequence

from fastapi import APIRouter
from sqlmodel import col, select

from gpustack.errors import NotFound
from gpustack.schemas.base import Page
from gpustack.schemas.devices import DeviceCore, DeviceMemory, GPUDevice
from gpustack.schemas.placements import Claim
from gpustack.server.api.context import Db
from gpustack.server.api.lists import Asked, IdFilter, SearchQuery, page_of
from gpustack.server.api.repeated import Repeated
from gpustack.server.auth.principals import Admin
from gpustack.server.db.database import ReadSession
from gpustack.server.db.tables import Device, Instance, Member, Worker

router = APIRouter(prefix="/v2/gpu-devices", tags=["gpu-devices"], route_class=Repeated)

_ID = re.compile("(?P<worker>.+):(?P<type>[^:]+):(?P<index>[0-9]{1,9})", re.DOTALL)
_WORKER_NAME = (
    select(col(Worker.name))
    .where(col(Worker.id) == col(Device.worker_id))
    .correlate(Device)
    .scalar_subquery()
)


#: What is shown of a device as its worker told it, and has no column.
_FACTS = (
    "parent_uuid",
    "driver_version",
    "runtime_version",
    "architecture",
    "compute_capability",
    "network",
    "problems",
)


class DeviceQuery(SearchQuery):
    TABLE = Device
    COLUMNS = {"worker_name": _WORKER_NAME, "memory_total": col(Device.memory_total_bytes)}
    SEARCHED = ("name", "worker_name")
    SORTED = ("worker_name", "index", "name", "vendor", "type", "memory_total")

    worker_id: IdFilter = None
    worker_name: str | None = None
    vendor: str | None = None
    type: str | None = None
    uuid: str | None = None


@router.get("")
async def list_gpu_devices(db: Db, admin: Admin, query: Asked[DeviceQuery]) -> Page[GPUDevice]:
    return await page_of(db, query, _shown)


@router.get("/{device_id:path}")
async def get_gpu_device(db: Db, admin: Admin, device_id: str) -> GPUDevice:
    """The device `worker:type:index`."""
    absent = NotFound(f"there is no GPU device {device_id}: want <worker>:<type>:<index>")
    parts = _ID.fullmatch(device_id)
    if parts is None:
        raise absent
    wanted = (
        select(col(Device.id))
        .where(_WORKER_NAME == parts["worker"], Device.type == parts["type"])
        .where(Device.index == int(parts["index"]))
    )
    async with db.read() as session:
        row_id = (await session.exec(wanted.order_by(col(Device.id)))).first()
        if row_id is None:
            raise absent
        return (await _shown(session, [row_id]))[row_id]


async def _shown(session: ReadSession, ids: Sequence[int]) -> dict[int, GPUDevice]:
    query = (
        select(Device, Worker)
        .join(Worker, col(Worker.id) == col(Device.worker_id))
        .where(col(Device.id).in_(ids))
    )
    rows = (await session.exec(query)).all()
    claims = await _claims(session, {worker.id or 0 for _, worker in rows})
    return {
        device.id or 0: _view(device, worker, _allocated(device, claims[device.worker_id]))
        for device, worker in rows
    }


def _allocated(row: Device, claims: Iterable[Claim]) -> int:
    return sum(claim.of_device(row.type, row.index) or 0 for claim in claims)


def _view(row: Device, worker: Worker, allocated: int) -> GPUDevice:
    """The row is what lists are made of; the worker's facts have the rest."""
    facts = (worker.facts or {}).get("gpu_devices", [])
    fact = facts[row.position] if row.position < len(facts) else {}
    measured = row.position < len(worker.devices_used)
    used = worker.devices_used[row.position] if measured else {}
    used_bytes = used.get("memory_used_bytes", 0)
    total = row.memory_total_bytes
    return GPUDevice(
        **row.model_dump(exclude={"id"}),
        **{name: fact[name] for name in _FACTS if name in fact},
        id=f"{worker.name}:{row.type}:{row.index}",
        worker_name=worker.name,
        worker_ip=worker.ip,
        core=DeviceCore(utilization_rate=used.get("utilization_percent")),
        memory=DeviceMemory(
            total=total,
            used=used_bytes,
            allocated=allocated,
            utilization_rate=100 * used_bytes / total if total else 0.0,
            is_unified_memory=fact.get("memory_unified", False),
        ),
        temperature=used.get("temperature_celsius"),
        power_watts=used.get("power_watts"),
        processes=used.get("processes", []),
    )


async def _claims(session: ReadSession, workers: Iterable[int]) -> dict[int, list[Claim]]:
    """By worker: what instances claim, with all or with a part of them."""
    claims: dict[int, list[Claim]] = {worker_id: [] for worker_id in workers}
    for table in (Instance, Member):
        here = col(table.worker_id).in_(claims)
        has_claim = col(table.claim).is_not(None)
        for worker_id, claim in await session.exec(
            select(table.worker_id, table.claim).where(here, has_claim)
        ):
            claims[worker_id or 0].append(Claim.model_validate(claim))
    return claims
