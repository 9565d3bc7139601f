"""From rows to schemas: what each audience sees of an object."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final, TypeVar

from pydantic import BaseModel
from sqlalchemy.orm import load_only
from sqlalchemy.orm.interfaces import ORMOption
from sqlmodel import col, select

from gpustack.lib.net import url_host
from gpustack.schemas import wire
from gpustack.schemas.access import Grants, RoutedModel
from gpustack.schemas.credentials import ApiKey, Credential, CredentialKind
from gpustack.schemas.instances import (
    AssignedInstance,
    Instance,
    InstanceState,
    Member,
    RoutedInstance,
    shown_state,
)
from gpustack.schemas.model_files import ModelFile, ModelFileState
from gpustack.schemas.model_files import shown_state as shown_file_state
from gpustack.schemas.models import Model, ModelSpec, Rollout, VersionSpec
from gpustack.schemas.workers import Leaving, ProxyMode, Worker, WorkerState, WorkerStatus
from gpustack.server import silence
from gpustack.server.auth.principals import Principal
from gpustack.server.db import tables
from gpustack.server.db.access import grants_of, groups_of, may_use, usable_by
from gpustack.server.db.database import ReadSession
from gpustack.server.db.drains import leaving_of
from gpustack.server.db.rollouts import rollouts_of
from gpustack.server.db.workers import by_tunnel

T = TypeVar("T")

#: So many objects are asked for at a time: databases bound the number of parameters.
_AT_ONCE = 5000


@dataclass(frozen=True)
class Audience:
    """Who looks. Two principals of one audience are sent the same bytes.

    Attributes:
        kind: users are KEY, however they came in.
        group_ids: of a user who is no administrator; None: who looks sees every model.
    """

    kind: CredentialKind
    worker_id: int | None = None
    user_id: int | None = None
    group_ids: frozenset[int] | None = None

    @classmethod
    def of(cls, principal: Principal) -> "Audience":
        if principal.kind is CredentialKind.GATEWAY:
            return GATEWAY
        if principal.kind is CredentialKind.WORKER:
            return cls(CredentialKind.WORKER, principal.worker_id)
        groups = None if principal.is_admin else principal.group_ids
        return cls(CredentialKind.KEY, user_id=principal.user_id, group_ids=groups)

    def of_kind(self, kind: str) -> "Audience":
        """All who are sent the same bytes of `kind` as this one.

        Only API keys are one user's, and the models that one who is no administrator may use.
        """
        if self.kind is not CredentialKind.KEY or kind == wire.API_KEYS or self.is_shown_part(kind):
            return self
        return ADMIN

    def is_shown_part(self, kind: str) -> bool:
        """Whether who looks may see some objects of `kind`, and must not hear of the others."""
        return kind == wire.MODELS and self.group_ids is not None

    def may_hear_of(self, change: tables.Change) -> bool:
        return change.user_id is None or change.user_id == self.user_id


ADMIN = Audience(CredentialKind.KEY)
GATEWAY = Audience(CredentialKind.GATEWAY)

#: Kinds that each audience may watch.
VISIBLE = {
    CredentialKind.KEY: {
        wire.MODELS,
        wire.INSTANCES,
        wire.WORKERS,
        wire.MODEL_FILES,
        wire.API_KEYS,
    },
    CredentialKind.GATEWAY: {wire.MODELS, wire.INSTANCES, wire.WORKERS, wire.CREDENTIALS},
    CredentialKind.WORKER: {wire.INSTANCES, wire.MODEL_FILES},
}


#: What an instance shows of its workers. What they have is long, and would be read for nothing.
_WORKER: Any = tables.Worker  # whose attributes are columns to SQLAlchemy
SHOWN_OF_WORKERS: Final = load_only(
    _WORKER.name,
    _WORKER.ip,
    _WORKER.silent,
    _WORKER.lost,
    _WORKER.grace_ends_at,
    _WORKER.heartbeat_at,
    raiseload=True,
)


@dataclass(frozen=True)
class Found:
    """An object with what it takes to show it to anybody, read in one transaction.

    Attributes:
        model, version, worker, user: what the row refers to, where its kind has such a thing.
        grants: of a model that is not every user's.
        group_ids: of a credential: those that its user is in.
        leaving: of a worker that is being drained: what is still on it.
        members: of an instance, by rank, each with its worker.
        replacement: of an instance: the name of the one that has its place.
    """

    kind: str
    id: int
    revision: int
    row: Any
    model: Any = None
    version: Any = None
    worker: tables.Worker | None = None
    rollout: Rollout | None = None
    user: tables.User | None = None
    members: Sequence[tuple[tables.Member, tables.Worker]] = ()
    replacement: str | None = None
    grants: Grants | None = None
    group_ids: frozenset[int] = frozenset()
    leaving: Sequence[Leaving] = ()

    def json(self, audience: Audience) -> bytes | None:
        """The object as `audience` sees it; None if it must not."""
        if self.kind not in VISIBLE[audience.kind]:
            return None
        if audience.worker_id is not None and self.row.worker_id != audience.worker_id:
            return None
        if self.kind == wire.API_KEYS and self.row.user_id != audience.user_id:
            return None
        if audience.is_shown_part(self.kind) and not may_use(
            self.grants, audience.user_id, audience.group_ids or frozenset()
        ):
            return None
        return self.view(audience).model_dump_json().encode()

    def view(self, audience: Audience) -> BaseModel:
        match self.kind:
            case wire.MODELS:
                return model_view(self, audience)
            case wire.INSTANCES:
                return instance_view(self, audience)
            case wire.WORKERS:
                return worker_view(self.row, self.leaving)
            case wire.MODEL_FILES:
                return model_file_view(self.row)
            case wire.API_KEYS:
                return api_key_view(self.row)
            case _:
                return credential_view(self)


def rows_for(kind: str, audience: Audience) -> list[Any]:
    """Conditions on the rows of `kind` that hold for those that the audience may see."""
    table: Any = tables.KINDS[kind]
    if kind == wire.API_KEYS:
        return [table.kind == CredentialKind.KEY, table.user_id == audience.user_id]
    if kind == wire.CREDENTIALS:
        return [table.kind != CredentialKind.JOIN]
    if audience.is_shown_part(kind):
        return [usable_by(audience.user_id)]
    return [] if audience.worker_id is None else [table.worker_id == audience.worker_id]


async def load(session: ReadSession, kind: str, *where: Any) -> list[Found]:
    """The objects of `kind` for whose rows the conditions hold, in order of id."""
    table = tables.KINDS[kind]
    rows = (await session.exec(select(table).where(*where).order_by(col(table.id)))).all()
    return [one for part in _parts(rows) for one in await _completed(session, kind, part)]


async def load_ids(session: ReadSession, kind: str, ids: Iterable[int]) -> list[Found]:
    """The objects of `kind` with these ids, in order of id; missing ones are left out."""
    row_id = col(tables.KINDS[kind].id)
    parts = _parts(sorted(ids))
    return [one for part in parts for one in await load(session, kind, row_id.in_(part))]


def _parts(all_of_them: Sequence[T]) -> Iterator[Sequence[T]]:
    return (all_of_them[at : at + _AT_ONCE] for at in range(0, len(all_of_them), _AT_ONCE))


async def _completed(session: ReadSession, kind: str, rows: Any) -> list[Found]:
    match kind:
        case wire.MODELS:
            return await with_versions(session, rows)
        case wire.INSTANCES:
            return await with_parents(session, rows)
        case wire.WORKERS:
            leaving = await leaving_of(session, rows)
            return [_found(kind, row, leaving=leaving.get(row.id, ())) for row in rows]
        case wire.CREDENTIALS:
            ids = {row.user_id for row in rows} - {None}
            whose = select(tables.User).where(col(tables.User.id).in_(ids))
            users = {user.id: user for user in (await session.exec(whose)).all()} if ids else {}
            groups = await groups_of(session, ids) if ids else {}
            return [
                _found(
                    kind,
                    row,
                    user=users.get(row.user_id),
                    group_ids=groups.get(row.user_id, frozenset()),
                )
                for row in rows
            ]
    return [_found(kind, row) for row in rows]


def _found(kind: str, row: Any, **parents: Any) -> Found:
    return Found(kind, row.id, row.revision, row, **parents)


async def with_versions(session: ReadSession, rows: Any) -> list[Found]:
    """Models with the version that is wanted of them and how far their instances are with it."""
    models = {row.id: row for row in rows}
    versions, rollouts = await rollouts_of(session, models)
    grants = await grants_of(session, models.values())
    return [
        _found(wire.MODELS, row, version=versions[id], rollout=rollouts[id], grants=grants.get(id))
        for id, row in models.items()
    ]


async def with_parents(session: ReadSession, rows: Any) -> list[Found]:
    """Instances with their model, version, worker and members."""

    async def by_id(table: Any, ids: set[int | None], *options: ORMOption) -> dict[int, Any]:
        these = select(table).where(col(table.id).in_(ids - {None}))
        return {row.id: row for row in (await session.exec(these.options(*options))).all()}

    models = await by_id(tables.Model, {row.model_id for row in rows})
    versions = await by_id(tables.ModelVersion, {row.version_id for row in rows})
    workers = await by_id(tables.Worker, {row.worker_id for row in rows}, SHOWN_OF_WORKERS)
    members: dict[int, list[tuple[tables.Member, tables.Worker]]] = {row.id: [] for row in rows}
    parts = (
        select(tables.Member, tables.Worker)
        .join(tables.Worker, col(tables.Worker.id) == tables.Member.worker_id)
        .where(col(tables.Member.instance_id).in_(members))
        .order_by(col(tables.Member.rank))
        .options(SHOWN_OF_WORKERS)
    )
    for member, on in (await session.exec(parts)).all():
        members[member.instance_id].append((member, on))
    replaced = {row.replaced_by for row in rows if row.lost} - {None}
    names: dict[int | None, str] = {}
    if replaced:
        theirs = select(tables.Instance.id, tables.Instance.name)
        chosen = theirs.where(col(tables.Instance.id).in_(replaced))
        names = dict((await session.exec(chosen)).all())
    return [
        _found(
            wire.INSTANCES,
            row,
            model=models[row.model_id],
            version=versions[row.version_id],
            worker=workers.get(row.worker_id),
            members=members[row.id],
            replacement=names.get(row.replaced_by),
        )
        for row in rows
    ]


def whole_spec(model: tables.Model, version: tables.ModelVersion) -> ModelSpec:
    """All that a user says of the model, with `version` for what instances are started from."""
    return ModelSpec.model_validate(version.spec | model.model_dump(include=_SPEC_COLUMNS))


_SPEC_COLUMNS = set(ModelSpec.model_fields) - set(VersionSpec.model_fields)


def model_view(found: Found, audience: Audience) -> Model:
    row = found.row
    facts: dict[str, Any] = (
        found.version.spec
        | row.model_dump(exclude={"revision"})
        | {
            "ready_replicas": found.rollout.ready if found.rollout else 0,
            "profile": found.version.profile,
            "state_message": row.rollout_message or found.version.problem,
            "rollout": found.rollout,
        }
    )
    if audience.kind is CredentialKind.GATEWAY:
        return RoutedModel.model_validate(facts | {"granted_to": found.grants})
    return Model.model_validate(facts | (_kept_from_users(facts) if _is_user(audience) else {}))


def _is_user(audience: Audience) -> bool:
    """Whether it is a user who is no administrator."""
    return audience.is_shown_part(wire.MODELS)


def _kept_from_users(facts: dict[str, Any]) -> dict[str, Any]:
    """What of a model is for who runs it: secrets may be in it, and how the cluster is made."""
    path, profile = facts.get("local_path"), facts["profile"]
    if path:
        path = PurePosixPath(path.replace("\\", "/")).name or "/"
    return {
        "env": {},
        "backend_parameters": [],
        "worker_selector": {},
        "local_path": path,
        "profile": profile and profile | {"source": "", "problem": ""},
        "state_message": "",
        "rollout": facts["rollout"] and facts["rollout"].model_copy(update={"message": ""}),
    }


def instance_view(found: Found, audience: Audience) -> Instance:
    row: tables.Instance = found.row
    facts: dict[str, Any] = row.model_dump(exclude={"revision", "reported_state", "secret"})
    facts |= {
        "model_name": found.model.name,
        "model_generation": found.version.generation,
        "worker_name": found.worker.name if found.worker else None,
        "worker_ip": found.worker.ip if found.worker else None,
        "state": instance_state(row, found.worker),
        "members": [member_view(row, *member) for member in found.members],
    }
    if found.worker is not None:
        on = (found.worker, *(worker for _, worker in found.members))
        if said := silence.of_instance(row, on, found.replacement):
            facts["state_message"] = said
    if audience.kind is CredentialKind.GATEWAY:
        return RoutedInstance.model_validate(facts | {"secret": row.secret})
    if audience.kind is CredentialKind.WORKER:
        return AssignedInstance.model_validate(
            facts
            | {
                "secret": row.secret,
                "spec": VersionSpec.model_validate(found.version.spec),
                "restart_on_error": found.model.restart_on_error,
                "drain": not found.model.deleting,
            }
        )
    return Instance.model_validate(facts)


def member_view(instance: tables.Instance, row: tables.Member, worker: tables.Worker) -> Member:
    state = shown_state(
        placed=True,
        deleting=instance.deleting,
        unreachable=worker.silent,
        reported=InstanceState(row.reported_state) if row.reported_state else None,
    )
    return Member.model_validate(row.model_dump() | {"worker_name": worker.name, "state": state})


def instance_state(row: tables.Instance, worker: tables.Worker | None) -> InstanceState:
    return shown_state(
        placed=row.worker_id is not None,
        deleting=row.deleting,
        unreachable=row.lost or bool(worker and worker.silent),
        reported=InstanceState(row.reported_state) if row.reported_state else None,
    )


def model_file_view(row: tables.ModelFile) -> ModelFile:
    state = shown_file_state(
        generation=row.generation,
        observed_generation=row.observed_generation,
        reported=ModelFileState(row.reported_state) if row.reported_state else None,
    )
    return ModelFile.model_validate(row.model_dump() | {"state": state})


def worker_view(row: tables.Worker, leaving: Sequence[Leaving] = ()) -> Worker:
    state, message = WorkerState.READY, ""
    if row.silent:
        state, message = WorkerState.UNREACHABLE, silence.of_worker(row)
    elif row.facts is None:
        state, message = WorkerState.NOT_READY, "it has not reported yet what it has"
    elif row.unreached and row.proxy_mode != ProxyMode.TUNNEL:
        message = (
            f"it cannot be reached at {url_host(row.ip)}:{row.port} from the server "
            f"({row.unreached}); requests go through the tunnel that its relay opens"
        )
    return Worker.model_validate(
        row.model_dump(
            exclude={"revision", "facts", "agent_secret", "machine_id", "run_id", "unreached"}
        )
        | {
            "labels": row.labels | row.admin_labels,
            "leaving": list(leaving),
            "state": state,
            "state_message": message,
            "reached_by": ProxyMode.TUNNEL if by_tunnel(row) else ProxyMode.DIRECT,
            "status": WorkerStatus.model_validate(_status(row, row.facts)) if row.facts else None,
        }
    )


def _status(row: tables.Worker, facts: dict[str, Any]) -> dict[str, Any]:
    """What the worker has, with how much of it is used."""
    devices, used = facts["gpu_devices"], row.devices_used
    if len(devices) == len(used):  # not measured yet, or before they changed
        devices = [device | its for device, its in zip(devices, used, strict=True)]
    measured = {"cpu_percent": row.cpu_percent, "memory_used_bytes": row.memory_used_bytes}
    return facts | measured | (row.host_used or {}) | {"gpu_devices": devices}


def api_key_view(row: tables.Credential) -> ApiKey:
    return ApiKey.model_validate(row.model_dump() | {"scope": row.scopes})


def credential_view(found: Found) -> Credential:
    row: tables.Credential = found.row
    return Credential.model_validate(
        row.model_dump()
        | {
            "is_admin": bool(found.user and found.user.is_admin),
            "group_ids": sorted(found.group_ids),
            "user_disabled": bool(found.user and not found.user.is_active),
            "password_change_required": bool(
                row.kind == CredentialKind.SESSION
                and found.user
                and found.user.require_password_change
            ),
        }
    )
