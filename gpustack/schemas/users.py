"""Users and how they log in."""

from pydantic import BaseModel, Field

from gpustack.schemas.base import Input, Time


class User(BaseModel):
    id: int
    username: str
    full_name: str | None = None
    is_admin: bool
    require_password_change: bool
    created_at: Time


class MeUpdate(Input):
    """What users may change of themselves: nothing that grants anything."""

    full_name: str | None = Field(None, max_length=128)


class PasswordUpdate(Input):
    current_password: str
    new_password: str
