"""Groups of users, and to whom models are granted."""

from typing import Annotated

from pydantic import AfterValidator, Field

from gpustack.schemas.base import Body, OneLine, Schema, Time
from gpustack.schemas.models import AccessPolicy, Model

#: Users or groups that one request may name.
AT_ONCE = 1000

GroupName = Annotated[OneLine, Field(min_length=1, max_length=128)]
Ids = Annotated[
    list[Annotated[int, Field(ge=1, le=2**63 - 1)]],
    Field(max_length=AT_ONCE),
    AfterValidator(lambda ids: sorted(set(ids))),
]


class GroupSpec(Body):
    """What administrators say of a group. No two have one name."""

    name: GroupName
    description: str | None = None


class GroupCreate(GroupSpec):
    """Body of POST /v2/groups."""


class GroupUpdate(GroupSpec):
    """Body of PUT /v2/groups/{id}: all that can be said of it.

    Attributes:
        generation: the generation that was read; a newer one is a conflict. None: do not compare.
    """

    generation: int | None = None


class Group(Schema):
    """Users to whom models are granted together.

    Attributes:
        members: how many.
    """

    id: int
    name: str
    description: str | None = None
    members: int
    generation: int
    created_at: Time


class GroupMember(Schema):
    """A user in a group.

    Attributes:
        id: the user's.
    """

    id: int
    username: str
    full_name: str | None = None


class MembersAdd(Body):
    """Body of POST /v2/groups/{id}/members. Who is a member already stays one."""

    user_ids: Ids


class GrantedUser(Schema):
    id: int
    username: str


class GrantedGroup(Schema):
    id: int
    name: str


class ModelAccess(Schema):
    """Who may see and call a model, besides administrators.

    Attributes:
        access_policy: the model's. The lists count where it is `allowed_users`.
    """

    access_policy: AccessPolicy
    users: list[GrantedUser]
    groups: list[GrantedGroup]


class ModelAccessUpdate(Body):
    """Body of PUT /v2/models/{id}/access: to whom the model is granted, all of them."""

    user_ids: Ids = []
    group_ids: Ids = []


class Grants(Schema):
    """To whom a model is granted."""

    user_ids: list[int]
    group_ids: list[int]


class RoutedModel(Model):
    """A model as gateways see it.

    Attributes:
        granted_to: None: to every user.
    """

    granted_to: Grants | None
