"""A model: what a user deploys."""

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, Strict, StringConstraints, model_validator

from gpustack.schemas.base import Body, Schema, Time
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


class AccessPolicy(StrEnum):
    """Who may see and call a model. Administrators may all."""

    AUTHED = "authed"  # every user
    ALLOWED_USERS = "allowed_users"  # those that it is granted to, themselves or their groups


class ModelSource(Schema):
    """Where a model's files come from.

    Attributes:
        huggingface_filename: one file of the repository; needed for GGUF.
        local_path: an absolute path on workers.
    """

    source: Annotated[Source, Strict(False)]
    huggingface_repo_id: str | None = None
    huggingface_filename: str | None = None
    local_path: str | None = None

    @model_validator(mode="after")
    def _source_is_complete(self) -> Self:
        if self.source is Source.LOCAL_PATH and not self.local_path:
            raise ValueError("source local_path needs local_path, an absolute path on the workers")
        if self.source is Source.HUGGING_FACE and not self.huggingface_repo_id:
            raise ValueError("source huggingface needs huggingface_repo_id, such as org/name")
        return self

    @property
    def identity(self) -> tuple[str, ...]:
        """The same for two that mean the same files."""
        if self.source is Source.LOCAL_PATH:
            return (self.source, str(self.local_path))
        return (self.source, str(self.huggingface_repo_id), self.huggingface_filename or "")

    @property
    def location(self) -> str:
        """Where the files come from, for people to read."""
        if self.source is Source.LOCAL_PATH:
            return str(self.local_path)
        file = f":{self.huggingface_filename}" if self.huggingface_filename else ""
        return f"{self.huggingface_repo_id}{file}"


class VersionSpec(ModelSource):
    """The part of a model's spec that an instance is started from.

    An instance keeps the version it was made with; editing the model makes a new one.

    Attributes:
        backend: engine to run it; None lets the server choose.
        backend_parameters: arguments for the engine, each `--name=value`, `--name` or a value.
    """

    categories: list[Annotated[Category, Strict(False)]] = Field(default_factory=list)
    backend: str | None = None
    backend_version: str | None = None
    backend_parameters: list[str] = Field(default_factory=list)
    env: dict[str, str] = Field(default_factory=dict)


class ModelSpec(VersionSpec):
    """All that a user may say of a model.

    Attributes:
        access_policy: who may see and call it; instances are not started from it.
    """

    name: Name
    description: str | None = None
    replicas: int = Field(1, ge=0, le=1000)
    placement_strategy: Annotated[PlacementStrategy, Strict(False)] = PlacementStrategy.SPREAD
    worker_selector: dict[str, str] = Field(default_factory=dict)
    restart_on_error: bool = True
    access_policy: Annotated[AccessPolicy, Strict(False)] = AccessPolicy.AUTHED

    def version(self) -> VersionSpec:
        """What an instance of it is started from."""
        return VersionSpec.model_validate(
            {name: getattr(self, name) for name in VersionSpec.model_fields}
        )


class ModelCreate(ModelSpec, Body):
    """Body of POST /v2/models."""


class ModelUpdate(ModelSpec, Body):
    """Body of PUT /v2/models/{id}: the whole spec.

    Attributes:
        generation: the generation that was read; a newer one is a conflict. None: do not compare.
    """

    generation: int | None = None


class RolloutState(StrEnum):
    """How far a model's instances are with the version that is wanted."""

    DONE = "done"  # as many as there should be are of that version and answer
    ROLLING = "rolling"  # some are not yet
    PAUSED = "paused"  # and nothing is being done about it; `message` says why


class VersionCount(Schema):
    """Instances of one version, those that are being stopped left out.

    Attributes:
        generation: the model's, that the version came with.
        ready: of them, those that answer.
    """

    generation: int
    instances: int = 0
    ready: int = 0


class Rollout(Schema):
    """How far a model's instances are with the version that is wanted.

    Attributes:
        generation: of the wanted version. One that says the same counts as that.
        message: why nothing more is done; empty otherwise.
        versions: oldest first; the wanted one always, others while there are instances of them.
    """

    generation: int
    state: RolloutState
    message: str = ""
    versions: list[VersionCount]

    @property
    def ready(self) -> int:
        """Instances that answer, of any version."""
        return sum(count.ready for count in self.versions)


class ModelVersion(Schema):
    """What instances were started from, as of one generation of their model.

    Attributes:
        wanted: instances should be of this version, or say the same.
    """

    generation: int
    wanted: bool
    spec: VersionSpec
    created_at: Time


class Rollback(Body):
    """Body of POST /v2/models/{id}/rollback.

    Attributes:
        to: generation whose version is wanted again; None: the newest that says something else
            than the present one.
        generation: the generation that was read; a newer one is a conflict. None: do not compare.
    """

    to: int | None = Field(None, ge=1, le=2**31 - 1)
    generation: int | None = None


class Deletion(Schema):
    """What became of one id of DELETE /v2/models?ids=….

    Attributes:
        deleting: it goes with its last instance; False: there is no such model.
    """

    id: int
    deleting: bool
    message: str = ""


class Deletions(Schema):
    items: list[Deletion]


class Model(ModelSpec):
    """A model as the API shows it.

    Attributes:
        generation: counts changes of the spec.
        ready_replicas: instances that answer requests now.
        rollout: which versions its instances are of.
        profile: what the model's own files say of it; None until they were read.
        state_message: why it is not what its spec says; empty when it is.
    """

    id: int
    generation: int
    ready_replicas: int = 0
    rollout: Rollout
    profile: Profile | None = None
    state_message: str = ""
    deleting: bool = False
    created_at: Time
    updated_at: Time
