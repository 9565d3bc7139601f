"""What the dashboard shows, by the names that existing clients know."""

from pydantic import Field

from gpustack.schemas.base import Schema


class ResourceCounts(Schema):
    worker_count: int
    gpu_count: int
    model_count: int
    model_instance_count: int


class Load(Schema):
    """How busy all workers are together, percent; 0 of what there is none."""

    cpu: float
    ram: float
    gpu: float
    vram: float


class Point(Schema):
    """Attributes:
    timestamp: seconds since the epoch.
    """

    timestamp: int
    value: float


class LoadHistory(Schema):
    cpu: list[Point] = Field(default_factory=list)
    ram: list[Point] = Field(default_factory=list)
    gpu: list[Point] = Field(default_factory=list)
    vram: list[Point] = Field(default_factory=list)


class SystemLoad(Schema):
    """Attributes:
    history: of the last hour, by the minute.
    """

    current: Load
    history: LoadHistory


class UsageStats(Schema):
    """One point per day, in UTC, that had requests."""

    api_request_history: list[Point]
    prompt_token_history: list[Point]
    completion_token_history: list[Point]


class UserUsage(Schema):
    """Attributes:
    username: empty: the user is gone.
    """

    user_id: int
    username: str
    prompt_token_count: int
    completion_token_count: int


class ModelUsage(UsageStats):
    """Attributes:
    top_users: those with the most tokens, ten at most.
    """

    top_users: list[UserUsage]


class ResourceClaim(Schema):
    """Bytes that a model's instances claim together."""

    ram: int
    vram: int


class ActiveModel(Schema):
    """Attributes:
    token_count: in the days that the dashboard is about.
    """

    id: int
    name: str
    categories: list[str]
    resource_claim: ResourceClaim
    instance_count: int
    token_count: int


class Dashboard(Schema):
    """Attributes:
    active_models: those that have instances, with the most tokens first; ten at most.
    """

    resource_counts: ResourceCounts
    system_load: SystemLoad
    model_usage: ModelUsage
    active_models: list[ActiveModel]
