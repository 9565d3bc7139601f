"""Who changed what, and whether the record of it is still the one that was written."""

from enum import StrEnum
from typing import Any

from pydantic import Field

from gpustack.schemas.base import Schema, Time


class Action(StrEnum):
    CREATE = "create"
    UPDATE = "update"
    DELETE = "delete"
    RETRY = "retry"
    REFUSED = "refused"  # a change that was asked for and not allowed; `name` is the route


class Changed(Schema):
    """A value before and after. What is secret shows as stars."""

    before: Any = None
    after: Any = None


class AuditEntry(Schema):
    """One administrative change.

    Attributes:
        username: as it was then; empty for a request without a login.
        credential_kind, credential_name: what the user showed; a session has no name.
        peer: address that the request came from, as the gateway saw it.
        kind, object_id, name: what was changed.
        changed: by field. A new object has no values before, a deleted one none after.
        remark: what else is worth knowing.
        previous, hash: SHA-256 of the entry before, and of this one with that.
    """

    id: int
    at: Time
    user_id: int | None = None
    username: str
    credential_kind: str
    credential_name: str
    peer: str
    action: Action
    kind: str
    object_id: int | None = None
    name: str
    changed: dict[str, Changed] = Field(default_factory=dict)
    remark: str = ""
    previous: str
    hash: str


class AuditProblem(Schema):
    """The first entry that is not as it was written."""

    id: int
    why: str


class Audited(Schema):
    """What a check of the whole audit log found.

    Attributes:
        entries: how many fit, from the oldest one that is kept.
        first_id, last_id: of those; None: there are none.
        hash: of the last of them. Noted elsewhere, it shows later that all up to it is unchanged.
        problem: None: every entry fits.
    """

    entries: int
    first_id: int | None = None
    last_id: int | None = None
    hash: str = ""
    problem: AuditProblem | None = None
