"""From rows to schemas: what each audience sees of an object."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from sqlmodel import col, select

from gpustack.schemas import wire
from gpustack.schemas.credentials import Credential, CredentialKind
from gpustack.schemas.instances import (
    AssignedInstance,
    Instance,
    InstanceState,
    RoutedInstance,
    shown_state,
)
from gpustack.schemas.models import Model, VersionSpec
from gpustack.schemas.workers import Worker, WorkerState, WorkerStatus
from gpustack.server.auth.principals import Principal
from gpustack.server.db import tables
from gpustack.server.db.database import ReadSession


@dataclass(frozen=True)
class Audience:
    """Who looks. Two principals of one audience are sent the same bytes."""

    kind: CredentialKind
    worker_id: int | None = None

    @classmethod
    def of(cls, principal: Principal) -> "Audience":
        if principal.kind is CredentialKind.GATEWAY:
            return GATEWAY
        if principal.kind is CredentialKind.WORKER:
            return cls(CredentialKind.WORKER, principal.worker_id)
        return USER


USER = Audience(CredentialKind.KEY)
GATEWAY = Audience(CredentialKind.GATEWAY)

#: Kinds that each audience may watch.
VISIBLE = {
    CredentialKind.KEY: {wire.MODELS, wire.INSTANCES, wire.WORKERS},
    CredentialKind.GATEWAY: {wire.MODELS, wire.INSTANCES, wire.WORKERS, wire.CREDENTIALS},
    CredentialKind.WORKER: {wire.INSTANCES},
}


@dataclass(frozen=True)
class Found:
    """An object with what it takes to show it to anybody, read in one transaction.

    Attributes:
        model, version, worker, user: what the row refers to, where its kind has such a thing.
    """

    kind: str
    id: int
    revision: int
    row: Any
    model: Any = None
    version: Any = None
    worker: tables.Worker | None = None
    ready_replicas: int = 0
    user: tables.User | None = None

    def json(self, audience: Audience) -> bytes | None:
        """The object as `audience` sees it; None if it must not."""
        if self.kind not in VISIBLE[audience.kind]:
            return None
        if audience.worker_id is not None and self.row.worker_id != audience.worker_id:
            return None
        return self.view(audience).model_dump_json().encode()

    def view(self, audience: Audience) -> BaseModel:
        match self.kind:
            case wire.MODELS:
                return model_view(self)
            case wire.INSTANCES:
                return instance_view(self, audience)
            case wire.WORKERS:
                return worker_view(self.row)
            case _:
                return credential_view(self)


async def load(session: ReadSession, kind: str, ids: list[int] | None = None) -> list[Found]:
    """The objects of `kind` with these ids (None: all), in order of id; missing ones left out."""
    table = tables.WATCHED[kind]
    key = col(table.id)
    query = select(table).order_by(key)
    rows: Any = (await session.exec(query if ids is None else query.where(key.in_(ids)))).all()
    match kind:
        case wire.MODELS:
            return await with_versions(session, rows)
        case wire.INSTANCES:
            return await with_parents(session, rows)
        case wire.CREDENTIALS:
            users = {user.id: user for user in (await session.exec(select(tables.User))).all()}
            return [_found(row, user=users.get(row.user_id)) for row in rows]
    return [_found(row) for row in rows]


def _found(row: Any, **parents: Any) -> Found:
    return Found(row.KIND, row.id, row.revision, row, **parents)


async def with_versions(session: ReadSession, rows: Any) -> list[Found]:
    """Models with their newest version and the number of their running instances."""
    ids = [row.id for row in rows]
    versions: dict[int, tables.ModelVersion] = {}
    query = select(tables.ModelVersion).where(col(tables.ModelVersion.model_id).in_(ids))
    for version in (await session.exec(query.order_by(col(tables.ModelVersion.generation)))).all():
        versions[version.model_id] = version
    ready = dict.fromkeys(ids, 0)
    running = (
        select(tables.Instance.model_id)
        .join(tables.Worker, col(tables.Worker.id) == tables.Instance.worker_id)
        .where(
            col(tables.Instance.model_id).in_(ids),
            tables.Instance.reported_state == InstanceState.RUNNING,
            col(tables.Instance.deleting).is_(False),
            col(tables.Worker.silent).is_(False),
        )
    )
    for model_id in (await session.exec(running)).all():
        ready[model_id] += 1
    return [_found(row, version=versions[row.id], ready_replicas=ready[row.id]) for row in rows]


async def with_parents(session: ReadSession, rows: Any) -> list[Found]:
    """Instances with their model, version and worker."""

    async def by_id(table: Any, ids: set[int | None]) -> dict[int, Any]:
        found = await session.exec(select(table).where(col(table.id).in_(ids - {None})))
        return {row.id: row for row in found.all()}

    models = await by_id(tables.Model, {row.model_id for row in rows})
    versions = await by_id(tables.ModelVersion, {row.version_id for row in rows})
    workers = await by_id(tables.Worker, {row.worker_id for row in rows})
    return [
        _found(
            row,
            model=models[row.model_id],
            version=versions[row.version_id],
            worker=workers.get(row.worker_id),
        )
        for row in rows
    ]


def model_view(found: Found) -> Model:
    row = found.row
    return Model.model_validate(
        found.version.spec
        | row.model_dump(exclude={"revision"})
        | {
            "ready_replicas": found.ready_replicas,
            "profile": found.version.profile,
            "state_message": found.version.problem,
        }
    )


def instance_view(found: Found, audience: Audience) -> Instance:
    row: tables.Instance = found.row
    facts: dict[str, Any] = row.model_dump(exclude={"revision", "reported_state", "secret"})
    facts |= {
        "model_name": found.model.name,
        "model_generation": found.version.generation,
        "worker_name": found.worker.name if found.worker else None,
        "state": instance_state(row, found.worker),
    }
    if audience.kind is CredentialKind.GATEWAY:
        return RoutedInstance.model_validate(facts | {"secret": row.secret})
    if audience.kind is CredentialKind.WORKER:
        return AssignedInstance.model_validate(
            facts
            | {
                "secret": row.secret,
                "spec": VersionSpec.model_validate(found.version.spec),
                "restart_on_error": found.model.restart_on_error,
            }
        )
    return Instance.model_validate(facts)


def instance_state(row: tables.Instance, worker: tables.Worker | None) -> InstanceState:
    return shown_state(
        placed=row.worker_id is not None,
        deleting=row.deleting,
        worker_silent=bool(worker and worker.silent),
        reported=InstanceState(row.reported_state) if row.reported_state else None,
    )


def worker_view(row: tables.Worker) -> Worker:
    state, message = WorkerState.READY, ""
    if row.silent:
        state, message = WorkerState.UNREACHABLE, "the server has not heard from it lately"
    elif row.facts is None:
        state, message = WorkerState.NOT_READY, "it has not reported yet what it has"
    measured = {"cpu_percent": row.cpu_percent, "memory_used_bytes": row.memory_used_bytes}
    return Worker.model_validate(
        row.model_dump(exclude={"revision", "facts", "agent_secret", "machine_id", "run_id"})
        | {
            "state": state,
            "state_message": message,
            "status": WorkerStatus.model_validate(row.facts | measured) if row.facts else None,
        }
    )


def credential_view(found: Found) -> Credential:
    row: tables.Credential = found.row
    return Credential.model_validate(
        row.model_dump()
        | {
            "password_change_required": bool(
                row.kind == CredentialKind.SESSION
                and found.user
                and found.user.require_password_change
            )
        }
    )
