"""Bringing the cluster to what a file says."""

from enum import StrEnum
from typing import Any

from pydantic import Field

from gpustack.schemas.base import Body, Schema
from gpustack.schemas.models import ModelCreate


class ApplyAction(StrEnum):
    CREATE = "create"
    UPDATE = "update"
    DELETE = "delete"


class FieldChange(Schema):
    """A field before and after; None where there is nothing."""

    before: Any = None
    after: Any = None


class ObjectChange(Schema):
    """What is done to one object.

    Attributes:
        kind: the key that it stands under in the file.
        generation: of the object that the change was made from; None: it is not there yet.
        fields: those that change, by name. A new object's are those that are no default.
        rolls: its instances are replaced.
    """

    kind: str
    name: str
    action: ApplyAction
    generation: int | None = None
    fields: dict[str, FieldChange] = Field(default_factory=dict)
    rolls: bool = False


class Manifest(Body):
    """Objects as a file has them, by kind; each whole: what it leaves out is the default.

    Attributes:
        models: None: the file says nothing of them.
    """

    models: list[ModelCreate] | None = Field(None, max_length=1000)


class Apply(Manifest):
    """Body of POST /v2/apply.

    Attributes:
        prune: delete what is not named, of the kinds that are.
        dry_run: only say what would change.
        plan: of a dry run; if the changes would be others now, that is a conflict. None: whatever
            changes it takes.
    """

    prune: bool = False
    dry_run: bool = False
    plan: str | None = Field(None, max_length=64)


class Applied(Schema):
    """What was changed, or would be; all of it or nothing.

    Attributes:
        changes: of what stays as it is nothing is said.
        plan: stands for exactly these changes.
    """

    changes: list[ObjectChange]
    plan: str
    dry_run: bool
