"""Token counts on their way from gateways to the server."""

from pydantic import Field

from gpustack.schemas.base import Input


class UsageRecord(Input):
    """One request.

    Attributes:
        operation: the path's last words, e.g. "chat/completions".
        estimated: no engine reported these counts.
        cut: the stream ended before its end.
        started_at: seconds since the epoch, by the gateway's clock.
    """

    request_id: str
    credential_id: int | None = None
    user_id: int | None = None
    model_id: int
    model: str
    instance_id: int | None = None
    operation: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    status: int = 0
    estimated: bool = False
    cut: bool = False
    started_at: float
    first_byte_ms: float | None = None
    total_ms: float | None = None


class UsageBatch(Input):
    """Records of one spool. A sequence number that was seen before is ignored."""

    spool: str = Field(pattern="^[0-9a-f]{32}$")
    sequence: int = Field(ge=1)
    records: list[UsageRecord] = Field(max_length=1000)
