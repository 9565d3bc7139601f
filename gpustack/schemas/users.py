"""Users and how they log in."""

from pydantic import BaseModel

from gpustack.schemas.base import Input, Time


class User(BaseModel):
    id: int
    username: str
    full_name: str | None = None
    is_admin: bool
    require_password_change: bool
    created_at: Time


class PasswordUpdate(Input):
    current_password: str
    new_password: str
