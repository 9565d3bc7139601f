"""Token counts on their way from gateways to the server, and what they come to."""

from datetime import date as Day
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from gpustack.schemas.base import Body, Schema, Time

RowId = Annotated[int | None, Field(ge=1, le=2**63 - 1)]
Tokens = Annotated[int, Field(ge=0, le=2**31 - 1)]
Milliseconds = Annotated[float | None, Field(ge=0, allow_inf_nan=False)]


class UsageRecord(Body):
    """One request.

    Attributes:
        operation: the path's last words, e.g. "chat/completions".
        estimated: no engine reported these counts.
        cut: the stream ended before its end.
        started_at: seconds since the epoch, by the gateway's clock.
    """

    request_id: str = Field(max_length=255)
    credential_id: RowId = None
    user_id: RowId = None
    model_id: int = Field(ge=1, le=2**63 - 1)
    model: str = Field(max_length=255)
    instance_id: RowId = None
    operation: str = Field(max_length=64)
    prompt_tokens: Tokens = 0
    completion_tokens: Tokens = 0
    status: int = Field(0, ge=0, le=999)
    estimated: bool = False
    cut: bool = False
    started_at: float = Field(ge=0, lt=253402300800)  # the year 10000
    first_byte_ms: Milliseconds = None
    total_ms: Milliseconds = None


class UsageBatch(Body):
    """Records of one spool. A sequence number that was seen before is ignored."""

    spool: str = Field(pattern="^[0-9a-f]{32}$")
    sequence: int = Field(ge=1, le=2**63 - 1)
    records: list[UsageRecord] = Field(max_length=1000)


class UsageEntry(Schema):
    """One request, as the API shows it.

    Attributes:
        user_name, credential_name: None: of nobody, or gone. Only API keys have names.
        completed: it was answered to the end, and not with an error.
        started_at: by the gateway's clock.
    """

    id: int
    request_id: str
    user_id: int | None = None
    user_name: str | None = None
    credential_id: int | None = None
    credential_name: str | None = None
    model_id: int
    model_name: str
    instance_id: int | None = None
    operation: str
    prompt_token_count: int
    completion_token_count: int
    status: int
    completed: bool
    estimated: bool
    cut: bool
    started_at: Time
    first_byte_ms: float | None = None
    total_ms: float | None = None


class UsageBy(StrEnum):
    """What sums of usage can be made by."""

    DATE = "date"  # days in UTC
    MODEL = "model"
    USER = "user"
    CREDENTIAL = "credential"
    OPERATION = "operation"


class UsageSum(Schema):
    """What requests that are alike come to. What they were not grouped by is None.

    Attributes:
        failed_count: requests whose answer was an error; they are in `request_count` too.
    """

    date: Day | None = None
    model_id: int | None = None
    model_name: str | None = None
    user_id: int | None = None
    user_name: str | None = None
    credential_id: int | None = None
    credential_name: str | None = None
    operation: str | None = None
    request_count: int
    failed_count: int
    prompt_token_count: int
    completion_token_count: int
