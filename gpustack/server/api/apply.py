"""/v2/apply: the cluster is brought to what a file says, all of it or nothing."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import APIRouter
from sqlalchemy.exc import IntegrityError
from sqlmodel import col, select

from gpustack.errors import Conflict, GPUStackError, Invalid, raises
from gpustack.schemas import wire
from gpustack.schemas.apply import Applied, Apply, ApplyAction, FieldChange, ObjectChange
from gpustack.schemas.models import ModelSpec, VersionSpec
from gpustack.server.api import specs
from gpustack.server.api.context import Db
from gpustack.server.api.repeated import Repeated
from gpustack.server.auth.principals import Admin
from gpustack.server.db import audit_log, tables
from gpustack.server.db.database import ReadSession, WriteSession
from gpustack.server.db.versions import of_newest_version
from gpustack.server.views import whole_spec

router = APIRouter(prefix="/v2/apply", tags=["apply"], route_class=Repeated)


@router.post("")
@raises(Conflict)
async def apply(db: Db, admin: Admin, body: Apply) -> Applied:
    """Create, update and, with `prune`, delete until the cluster is what the body says.

    A dry run changes nothing and answers the same. Errors say in `detail` which object is meant:
    its `kind`, and its `index` in the body.
    """
    _check(body)
    if body.dry_run:
        async with db.read() as session:
            return _answer(body, await _changes(session, body))
    try:
        async with db.write() as session:
            if body.plan is None:
                audit_log.remark(session, audit_log.LAST_WRITER_WINS)
            answer = _answer(body, await _changes(session, body))
            if body.plan not in {None, answer.plan}:
                raise Conflict(
                    "the cluster has changed since the dry run: look at the changes again",
                    current=answer.model_dump(mode="json"),
                )
            await _carry_out(session, body, answer.changes)
    except IntegrityError:  # another server was faster
        raise Conflict("somebody else took one of these names at the same moment") from None
    return answer


def _check(body: Apply) -> None:
    """Raises Invalid: an object is not valid, or stands in the body twice."""
    first: dict[str, int] = {}
    for index, spec in enumerate(body.models or []):
        where = {"kind": wire.MODELS, "index": index}
        if spec.name in first:
            message = f"model {spec.name} is there twice"
            raise Invalid(message, first=first[spec.name], **where)
        first[spec.name] = index
        try:
            specs.check(spec)
        except GPUStackError as error:
            raise Invalid(f"model {spec.name}: {error}", **where) from None


async def _changes(session: ReadSession, body: Apply) -> list[ObjectChange]:
    """From what is there to what the body says, in its order; deletions come last."""
    if body.models is None:
        return []
    query = (
        select(tables.Model, tables.ModelVersion)
        .join(tables.ModelVersion, of_newest_version()[0])
        .where(of_newest_version()[1])
        .order_by(col(tables.Model.id))
    )
    found = {row.name: (row, version) for row, version in (await session.exec(query)).all()}
    changes: list[ObjectChange] = []
    for index, spec in enumerate(body.models):
        row, version = found.pop(spec.name, (None, None))
        if row is None or version is None:
            changes.append(_creation(spec))
            continue
        if row.deleting:
            message = f"model {spec.name} is being deleted: its name is free after that"
            raise Conflict(message, kind=wire.MODELS, index=index)
        if fields := _changed(whole_spec(row, version), spec):
            changes.append(_update(row, fields, spec))
    if body.prune:
        changes += [
            ObjectChange(
                kind=wire.MODELS,
                name=row.name,
                action=ApplyAction.DELETE,
                generation=row.generation,
            )
            for row, _ in found.values()
            if not row.deleting
        ]
    return changes


def _creation(spec: ModelSpec) -> ObjectChange:
    fields = {
        name: FieldChange(after=value)
        for name, value in _fields(spec).items()
        if name != "name" and value != _DEFAULTS.get(name)
    }
    return ObjectChange(kind=wire.MODELS, name=spec.name, action=ApplyAction.CREATE, fields=fields)


def _changed(before: ModelSpec, after: ModelSpec) -> dict[str, FieldChange]:
    old, new = _fields(before), _fields(after)
    return {
        name: FieldChange(before=old[name], after=value)
        for name, value in new.items()
        if old[name] != value
    }


def _update(row: tables.Model, fields: dict[str, FieldChange], spec: ModelSpec) -> ObjectChange:
    return ObjectChange(
        kind=wire.MODELS,
        name=row.name,
        action=ApplyAction.UPDATE,
        generation=row.generation,
        fields=fields,
        rolls=bool(fields.keys() & VersionSpec.model_fields.keys()) and spec.replicas > 0,
    )


def _fields(spec: ModelSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", include=set(ModelSpec.model_fields))


def _defaults() -> Iterator[tuple[str, Any]]:
    for name, field in ModelSpec.model_fields.items():
        if not field.is_required():
            yield name, field.get_default(call_default_factory=True)


_DEFAULTS: Mapping[str, Any] = dict(_defaults())


def _answer(body: Apply, changes: list[ObjectChange]) -> Applied:
    plan = hashlib.sha256()
    for change in changes:
        plan.update(change.model_dump_json().encode())
    return Applied(changes=changes, plan=plan.hexdigest(), dry_run=body.dry_run)


async def _carry_out(session: WriteSession, body: Apply, changes: list[ObjectChange]) -> None:
    wanted = {spec.name: spec for spec in body.models or []}
    for change in changes:
        if change.action is ApplyAction.CREATE:
            await specs.create(session, wanted[change.name])
            continue
        its = select(tables.Model).where(tables.Model.name == change.name).with_for_update()
        row = (await session.exec(its)).one()
        if change.action is ApplyAction.DELETE:
            row.deleting = True
        else:
            await specs.change(session, row, wanted[change.name])
