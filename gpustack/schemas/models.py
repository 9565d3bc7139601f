"""A model: what a user deploys."""

from enum import StrEnum
from typing import Annotated, Self

from pydantic import BaseModel, Field, StringConstraints, model_validator

from gpustack.schemas.base import Input, Time
from gpustack.schemas.profiles import Profile

NAME_PATTERN = r"^[A-Za-z0-9._:/-]{1,128}$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]


class Source(StrEnum):
    HUGGING_FACE = "huggingface"
    LOCAL_PATH = "local_path"


class Category(StrEnum):
    LLM = "llm"
    EMBEDDING = "embedding"
    RERANKER = "reranker"


class PlacementStrategy(StrEnum):
    SPREAD = "spread"  # prefer the emptiest worker
    BINPACK = "binpack"  # prefer the fullest that still fits


class VersionSpec(BaseModel):
    """The part of a model's spec that an instance is started from.

    An instance keeps the version it was made with; editing the model makes a new one.

    Attributes:
        huggingface_filename: one file of the repository; needed for GGUF.
        backend: engine to run it; None lets the server choose.
        backend_parameters: arguments for the engine, each `--name=value`, `--name` or a value.
    """

    source: Source
    huggingface_repo_id: str | None = None
    huggingface_filename: str | None = None
    local_path: str | None = None
    categories: list[Category] = Field(default_factory=list)
    backend: str | None = None
    backend_version: str | None = None
    backend_parameters: list[str] = Field(default_factory=list)
    env: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _source_is_complete(self) -> Self:
        if self.source is Source.LOCAL_PATH and not self.local_path:
            raise ValueError("source local_path needs local_path, an absolute path on the workers")
        if self.source is Source.HUGGING_FACE and not self.huggingface_repo_id:
            raise ValueError("source huggingface needs huggingface_repo_id, such as org/name")
        return self

    @property
    def location(self) -> str:
        """Where the files come from, for people to read."""
        if self.source is Source.LOCAL_PATH:
            return str(self.local_path)
        file = f":{self.huggingface_filename}" if self.huggingface_filename else ""
        return f"{self.huggingface_repo_id}{file}"


class ModelSpec(VersionSpec):
    """All that a user may say of a model."""

    name: Name
    description: str | None = None
    replicas: int = Field(1, ge=0, le=1000)
    placement_strategy: PlacementStrategy = PlacementStrategy.SPREAD
    worker_selector: dict[str, str] = Field(default_factory=dict)
    restart_on_error: bool = True

    def version(self) -> VersionSpec:
        """What an instance of it is started from."""
        return VersionSpec.model_validate(
            {name: getattr(self, name) for name in VersionSpec.model_fields}
        )


class ModelCreate(ModelSpec, Input):
    """Body of POST /v2/models."""


class ModelUpdate(ModelSpec, Input):
    """Body of PUT /v2/models/{id}: the whole spec.

    Attributes:
        generation: the generation that was read; a newer one is a conflict. None: do not compare.
    """

    generation: int | None = None


class Model(ModelSpec):
    """A model as the API shows it.

    Attributes:
        generation: counts changes of the spec.
        ready_replicas: instances that answer requests now.
        profile: what the model's own files say of it; None until they were read.
        state_message: why it is not what its spec says; empty when it is.
    """

    id: int
    generation: int
    ready_replicas: int = 0
    profile: Profile | None = None
    state_message: str = ""
    deleting: bool = False
    created_at: Time
    updated_at: Time
