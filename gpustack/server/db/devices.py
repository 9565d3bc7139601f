"""Devices as rows, so that lists of them are made in SQL."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete
from sqlmodel import col

from gpustack.schemas import workers as schemas
from gpustack.server.db.database import WriteSession
from gpustack.server.db.tables import Device


async def set_devices(
    session: WriteSession, worker_id: int, devices: Sequence[schemas.Device]
) -> None:
    """Have exactly these devices of a worker."""
    await session.exec(delete(Device).where(col(Device.worker_id) == worker_id))
    session.add_all(
        Device(worker_id=worker_id, position=position, **_columns(device))
        for position, device in enumerate(devices)
    )


def _columns(device: schemas.Device) -> dict[str, Any]:
    listed = device.model_dump(include=set(Device.model_fields))
    return listed | {"type": device.type or device.vendor.lower()}
