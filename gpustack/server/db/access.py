"""Who may see and call which models.

Two ways to ask, of one rule: as a condition for lists, and as what a model and a user are sent with
to those who decide by themselves (watches of users, gateways). A user who joins or leaves a group
changes what the own credentials stand for, and no model: so that costs a few rows, however many
models the group was granted.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import exists, or_
from sqlmodel import col, select

from gpustack.errors import Invalid
from gpustack.schemas.access import GrantedGroup, GrantedUser, Grants
from gpustack.schemas.models import AccessPolicy
from gpustack.server.db.database import ReadSession, WriteSession, touch
from gpustack.server.db.tables import Group, GroupMember, Model, ModelGroup, ModelUser, User


def usable_by(user_id: int | None) -> Any:
    """The condition on models that this user, who is no administrator, may see and call them."""
    through_group = (
        exists()
        .where(col(ModelGroup.model_id) == col(Model.id))
        .where(col(ModelGroup.group_id) == col(GroupMember.group_id))
        .where(col(GroupMember.user_id) == user_id)
    )
    return or_(
        col(Model.access_policy) == AccessPolicy.AUTHED,
        exists().where(col(ModelUser.model_id) == col(Model.id), col(ModelUser.user_id) == user_id),
        through_group,
    )


def may_use(grants: Grants | None, user_id: int | None, group_ids: frozenset[int]) -> bool:
    """The same for one model, with what it is granted to; None: to every user."""
    return (
        grants is None or user_id in grants.user_ids or not group_ids.isdisjoint(grants.group_ids)
    )


async def groups_of(
    session: ReadSession, user_ids: Collection[int | None]
) -> dict[int | None, frozenset[int]]:
    """By user: the groups that it is in. Who is in none is left out."""
    query = select(GroupMember).where(col(GroupMember.user_id).in_(user_ids))
    found: dict[int, set[int]] = {}
    for row in (await session.exec(query)).all():
        found.setdefault(row.user_id, set()).add(row.group_id)
    return {user_id: frozenset(groups) for user_id, groups in found.items()}


async def grants_of(session: ReadSession, models: Iterable[Model]) -> Mapping[int, Grants]:
    """By model, of those that are not every user's: to whom it is granted."""
    limited = [row.id or 0 for row in models if row.access_policy != AccessPolicy.AUTHED]
    grants = {model_id: Grants(user_ids=[], group_ids=[]) for model_id in limited}
    if limited:
        of_users = select(ModelUser).where(col(ModelUser.model_id).in_(limited))
        for user in (await session.exec(of_users.order_by(col(ModelUser.user_id)))).all():
            grants[user.model_id].user_ids.append(user.user_id)
        of_groups = select(ModelGroup).where(col(ModelGroup.model_id).in_(limited))
        for group in (await session.exec(of_groups.order_by(col(ModelGroup.group_id)))).all():
            grants[group.model_id].group_ids.append(group.group_id)
    return grants


async def granted_users(session: ReadSession, model_id: int) -> list[GrantedUser]:
    query = (
        select(User.id, User.username)
        .join(ModelUser, col(ModelUser.user_id) == col(User.id))
        .where(col(ModelUser.model_id) == model_id)
        .order_by(col(User.id))
    )
    rows = (await session.exec(query)).all()
    return [GrantedUser(id=user_id or 0, username=name) for user_id, name in rows]


async def granted_groups(session: ReadSession, model_id: int) -> list[GrantedGroup]:
    query = (
        select(Group.id, Group.name)
        .join(ModelGroup, col(ModelGroup.group_id) == col(Group.id))
        .where(col(ModelGroup.model_id) == model_id)
        .order_by(col(Group.id))
    )
    rows = (await session.exec(query)).all()
    return [GrantedGroup(id=group_id or 0, name=name) for group_id, name in rows]


async def grant(
    session: WriteSession, model: Model, user_ids: Sequence[int], group_ids: Sequence[int]
) -> None:
    """Make these, and no others, those whom the model is granted to.

    Raises:
        Invalid: there is no such user or group.
    """
    await lock_users(session, user_ids)
    await _lock(session, Group, "group_ids: there is no group with id", group_ids)
    model_id = model.key()[1]
    users = select(ModelUser).where(col(ModelUser.model_id) == model_id)
    wanted = set(user_ids)
    for user in (await session.exec(users)).all():
        if user.user_id not in wanted:
            await session.delete(user)
        wanted.discard(user.user_id)
    session.add_all(ModelUser(model_id=model_id, user_id=one) for one in sorted(wanted))
    groups = select(ModelGroup).where(col(ModelGroup.model_id) == model_id)
    wanted = set(group_ids)
    for group in (await session.exec(groups)).all():
        if group.group_id not in wanted:
            await session.delete(group)
        wanted.discard(group.group_id)
    session.add_all(ModelGroup(model_id=model_id, group_id=one) for one in sorted(wanted))
    touch(session, model)
    await session.flush()


async def lock_users(session: WriteSession, user_ids: Collection[int]) -> list[User]:
    """The users, whom nobody deletes before this transaction ends.

    Raises:
        Invalid: one is not there.
    """
    return await _lock(session, User, "user_ids: there is no user with id", user_ids)


async def _lock(session: WriteSession, table: Any, missing: str, ids: Collection[int]) -> list[Any]:
    # In one order, so that no two requests wait for each other.
    query = select(table).where(table.id.in_(ids)).order_by(table.id).with_for_update()
    rows = list((await session.exec(query)).all())
    if gone := sorted(set(ids) - {row.id for row in rows}):
        raise Invalid(f"{missing} {gone[0]}")
    return rows


async def join(session: WriteSession, group: Group, user_ids: Sequence[int]) -> list[str]:
    """Make these users members; answers the names of those who were not yet.

    Raises:
        Invalid: there is no such user.
    """
    users = await lock_users(session, user_ids)
    group_id = group.id or 0
    already = select(GroupMember.user_id).where(
        col(GroupMember.group_id) == group_id, col(GroupMember.user_id).in_(user_ids)
    )
    are_in = set((await session.exec(already)).all())
    new = [user for user in users if user.id not in are_in]
    session.add_all(GroupMember(group_id=group_id, user_id=user.id or 0) for user in new)
    await session.flush()
    return [user.username for user in new]


async def remove_group(session: WriteSession, group: Group) -> None:
    """Delete the group. What it was granted, its members may not use any more through it.

    Its members leave one by one, since what their credentials stand for is another then.
    """
    leave = select(GroupMember).where(col(GroupMember.group_id) == group.id)
    its = [row.user_id for row in (await session.exec(leave)).all()]
    locked = select(User.id).where(col(User.id).in_(its)).order_by(col(User.id))
    await session.exec(locked.with_for_update())  # no key of theirs is made meanwhile
    for member in (await session.exec(leave)).all():
        await session.delete(member)
    granted = (
        select(Model)
        .join(ModelGroup, col(ModelGroup.model_id) == col(Model.id))
        .where(col(ModelGroup.group_id) == group.id)
    )
    for model in (await session.exec(granted)).all():
        touch(session, model)
    await session.flush()
    await session.delete(group)
