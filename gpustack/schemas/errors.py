"""What is answered instead of what was asked for."""

from typing import Any

from pydantic import Field

from gpustack.schemas.base import Schema


class Error(Schema):
    """The body of every answer with a status of 400 or more.

    Attributes:
        code: for programs; it never changes.
        message: what was wrong and what would be right, for people to read.
        detail: more of it for programs; `current`, where an update was made from what is no
            longer there, is the object as it is.
    """

    code: str
    message: str
    detail: dict[str, Any] = Field(default_factory=dict)
