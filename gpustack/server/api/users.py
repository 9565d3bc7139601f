"""/v2/users."""

from fastapi import APIRouter

from gpustack.schemas.users import MeUpdate, User
from gpustack.server.api.context import Db
from gpustack.server.auth.principals import AnyUser, LoggedIn
from gpustack.server.db import tables

router = APIRouter(prefix="/v2/users", tags=["users"])


@router.get("/me")
async def me(db: Db, user: LoggedIn) -> User:
    """Who is asking."""
    async with db.read() as session:
        row = await session.get_one(tables.User, user.user_id)
    return User.model_validate(row, from_attributes=True)


@router.put("/me")
async def update_me(db: Db, user: AnyUser, wanted: MeUpdate) -> User:
    """Change the own name."""
    async with db.write() as session:
        row = await session.get_one(tables.User, user.user_id)
        row.full_name = wanted.full_name
    return User.model_validate(row, from_attributes=True)
