"""States that are computed, as SQL: the same words as `gpustack.server.views` shows."""

from typing import Any

from sqlalchemy import ColumnElement, case, func, or_
from sqlmodel import col, select

from gpustack.schemas.instances import InstanceState
from gpustack.schemas.model_files import ModelFileState
from gpustack.schemas.workers import WorkerState
from gpustack.server.db.tables import Instance, ModelFile, Worker


def worker_state() -> ColumnElement[Any]:
    return case(
        (col(Worker.silent), WorkerState.UNREACHABLE.value),
        (col(Worker.facts).is_(None), WorkerState.NOT_READY.value),
        else_=WorkerState.READY.value,
    )


def instance_state() -> ColumnElement[Any]:
    is_silent = (
        select(col(Worker.silent))
        .where(col(Worker.id) == col(Instance.worker_id))
        .correlate(Instance)
        .scalar_subquery()
    )
    return case(
        (col(Instance.deleting), InstanceState.STOPPING.value),
        (col(Instance.worker_id).is_(None), InstanceState.PENDING.value),
        (or_(is_silent, col(Instance.lost)), InstanceState.UNREACHABLE.value),
        else_=func.coalesce(Instance.reported_state, InstanceState.SCHEDULED.value),
    )


def model_file_state() -> ColumnElement[Any]:
    return case(
        (col(ModelFile.reported_state).is_(None), ModelFileState.DOWNLOADING.value),
        (
            col(ModelFile.observed_generation) < col(ModelFile.generation),
            ModelFileState.DOWNLOADING.value,
        ),
        else_=ModelFile.reported_state,
    )
