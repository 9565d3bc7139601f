"""/v2/groups: users to whom models are granted together."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, Response
from sqlalchemy import func
from sqlalchemy.exc import IntegrityError
from sqlmodel import col, select

from gpustack.errors import Conflict, NotFound, raises
from gpustack.schemas.access import Group, GroupCreate, GroupMember, GroupUpdate, MembersAdd
from gpustack.schemas.audit import Action
from gpustack.schemas.base import Page
from gpustack.server.api.conditions import IfMatch, change, expect, tag
from gpustack.server.api.context import Db, Id
from gpustack.server.api.lists import Asked, SearchQuery, page_of
from gpustack.server.api.repeated import Repeated
from gpustack.server.auth.principals import Admin
from gpustack.server.db import audit_log, tables
from gpustack.server.db.access import join, remove_group
from gpustack.server.db.audited import Entry
from gpustack.server.db.database import ReadSession, WriteSession, find

router = APIRouter(prefix="/v2/groups", tags=["groups"], route_class=Repeated)


class GroupQuery(SearchQuery):
    TABLE = tables.Group
    SORTED = ("name", "created_at")

    name: str | None = None


class MemberQuery(SearchQuery):
    TABLE = tables.User
    SEARCHED = ("username", "full_name")
    SORTED = ("username", "full_name")


@router.get("")
async def list_groups(db: Db, admin: Admin, query: Asked[GroupQuery]) -> Page[Group]:
    return await page_of(db, query, _shown)


@router.post("", status_code=201)
@raises(Conflict)
async def create_group(db: Db, admin: Admin, wanted: GroupCreate, response: Response) -> Group:
    row = tables.Group(**wanted.model_dump())
    with _name_is_free(wanted.name):
        async with db.write() as session:
            session.add(row)
            await session.flush()
            group = await _view(session, row)
    tag(response, group.generation)
    return group


@router.get("/{group_id}")
async def get_group(db: Db, admin: Admin, group_id: Id, response: Response) -> Group:
    """The ETag is the generation: an update may name it in If-Match."""
    async with db.read() as session:
        group = await _view(session, await _get(session, group_id))
    tag(response, group.generation)
    return group


@router.put("/{group_id}")
@raises(Conflict)
async def update_group(
    db: Db, admin: Admin, group_id: Id, wanted: GroupUpdate, if_match: IfMatch, response: Response
) -> Group:
    """Change name and description; compared as for PUT /v2/users/{id}."""
    with _name_is_free(wanted.name):
        async with db.write() as session:
            row = await _get(session, group_id)
            expect(
                session,
                f"group {row.name}",
                row.generation,
                header=if_match,
                body=wanted.generation,
                current=(await _view(session, row)).model_dump(mode="json"),
            )
            change(row, wanted.model_dump(exclude={"generation"}))
            group = await _view(session, row)
    tag(response, group.generation)
    return group


@router.delete("/{group_id}", status_code=204)
async def delete_group(db: Db, admin: Admin, group_id: Id) -> Response:
    """Remove a group, and with it what was granted to it. Its members stay users."""
    async with db.write() as session:
        await remove_group(session, await _get(session, group_id))
    return Response(status_code=204)


@router.get("/{group_id}/members")
async def list_group_members(
    db: Db, admin: Admin, group_id: Id, query: Asked[MemberQuery]
) -> Page[GroupMember]:
    async with db.read() as session:
        await _get(session, group_id)
    its = select(tables.GroupMember.user_id).where(col(tables.GroupMember.group_id) == group_id)
    return await page_of(db, query, _members, col(tables.User.id).in_(its))


@router.post("/{group_id}/members", status_code=204)
async def add_group_members(db: Db, admin: Admin, group_id: Id, wanted: MembersAdd) -> Response:
    """Make users members, all or none of them. Who is one stays one."""
    async with db.write() as session:
        row = await _get(session, group_id)
        if new := await join(session, row, wanted.user_ids):
            _audit(session, row, {"members_added": new})
    return Response(status_code=204)


@router.delete("/{group_id}/members/{user_id}", status_code=204)
async def remove_group_member(db: Db, admin: Admin, group_id: Id, user_id: Id) -> Response:
    async with db.write() as session:
        row = await _get(session, group_id)
        user = await find(session, tables.User, user_id)  # locked: no key is made meanwhile
        member = await session.get(tables.GroupMember, (group_id, user_id))
        if member is None or user is None:
            raise NotFound(f"there is no user with id {user_id} in group {row.name}")
        await session.delete(member)
        _audit(session, row, {"members_removed": [user.username]})
    return Response(status_code=204)


def _audit(session: WriteSession, row: tables.Group, after: dict[str, Any]) -> None:
    audit_log.add(session, Entry(Action.UPDATE, "groups", row.id, row.name, after=after))


@contextmanager
def _name_is_free(name: str) -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise Conflict(f"a group named {name} exists already") from None


async def _get(session: ReadSession, group_id: int) -> tables.Group:
    row = await find(session, tables.Group, group_id)
    if row is None:
        raise NotFound(f"there is no group with id {group_id}")
    return row


async def _view(session: ReadSession, row: tables.Group) -> Group:
    return _group(row, await _sizes(session, [row.id or 0]))


async def _shown(session: ReadSession, ids: Sequence[int]) -> dict[int, Group]:
    rows = await session.exec(select(tables.Group).where(col(tables.Group.id).in_(ids)))
    sizes = await _sizes(session, ids)
    return {row.id or 0: _group(row, sizes) for row in rows.all()}


async def _sizes(session: ReadSession, ids: Sequence[int]) -> dict[int, int]:
    """How many members these groups have; those that have none are left out."""
    group_id = col(tables.GroupMember.group_id)
    query = select(group_id, func.count()).where(group_id.in_(ids)).group_by(group_id)
    return dict((await session.exec(query)).all())


def _group(row: tables.Group, sizes: dict[int, int]) -> Group:
    return Group.model_validate(row.model_dump() | {"members": sizes.get(row.id or 0, 0)})


async def _members(session: ReadSession, ids: Sequence[int]) -> dict[int, GroupMember]:
    rows = await session.exec(select(tables.User).where(col(tables.User.id).in_(ids)))
    return {
        row.id or 0: GroupMember.model_validate(row, from_attributes=True) for row in rows.all()
    }
