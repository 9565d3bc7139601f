"""The tables. A row is never input, and never leaves the server: schemas do.

Columns are grouped by who writes them: users (spec), the scheduler (placement), the worker that
an instance is on (status), the server itself. Two groups never share a writer.
"""

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, Column, DateTime, UniqueConstraint
from sqlmodel import Field, SQLModel

from gpustack.schemas import wire


def now() -> datetime:
    return datetime.now(UTC)


def _json(**options: Any) -> Any:
    return Field(sa_column=Column(JSON, nullable=False), **options)


def _json_or_null() -> Any:
    return Field(default=None, sa_column=Column(JSON(none_as_null=True), nullable=True))


def _time(**options: Any) -> Any:
    return Field(sa_type=DateTime(timezone=True), **options)


class Watched(SQLModel):
    """A row whose changes watchers hear of.

    Attributes:
        revision: of the last change. Written by `Database.write` alone.
    """

    KIND: ClassVar[str]
    id: int | None = Field(default=None, primary_key=True)
    revision: int = Field(default=0, sa_type=BigInteger, index=True)

    def key(self) -> tuple[str, int]:
        """Kind and id of a row that has been flushed."""
        if self.id is None:
            raise ValueError(f"this {self.KIND} row has no id before it is flushed")
        return self.KIND, self.id


class Cluster(SQLModel, table=True):
    """One row: what makes this cluster this cluster. Made once, under the migration lock.

    Attributes:
        epoch: part of every cursor; new when a backup is restored.
        token_digest: of the secret with which workers register.
    """

    __tablename__ = "cluster"

    id: int = Field(default=1, primary_key=True)
    cluster_id: str
    epoch: str
    token_digest: str


class Counter(SQLModel, table=True):
    """One row: the revision of the last committed change."""

    __tablename__ = "counter"

    id: int = Field(default=1, primary_key=True)
    revision: int = Field(sa_type=BigInteger)


class Change(SQLModel, table=True):
    """The bounded history that watches resume from."""

    __tablename__ = "changes"

    revision: int = Field(
        sa_type=BigInteger, primary_key=True, sa_column_kwargs={"autoincrement": False}
    )
    kind: str = Field(primary_key=True, max_length=32)
    object_id: int = Field(primary_key=True, sa_column_kwargs={"autoincrement": False})
    deleted: bool


class User(SQLModel, table=True):
    __tablename__ = "users"
    __table_args__ = {"sqlite_autoincrement": True}

    id: int | None = Field(default=None, primary_key=True)
    username: str = Field(unique=True, max_length=128)
    full_name: str | None = None
    password_hash: str
    is_admin: bool = False
    require_password_change: bool = False
    created_at: datetime = _time(default_factory=now)


class Credential(Watched, table=True):
    """Every secret that opens something, by its SHA-256 digest."""

    __tablename__ = "credentials"
    __table_args__ = {"sqlite_autoincrement": True}
    KIND: ClassVar[str] = wire.CREDENTIALS

    kind: str = Field(max_length=16)
    digest: str = Field(unique=True, max_length=64)
    name: str = ""
    description: str | None = None
    prefix: str = ""
    user_id: int | None = Field(default=None, foreign_key="users.id", index=True)
    worker_id: int | None = Field(default=None, foreign_key="workers.id", index=True)
    scopes: list[str] = _json()
    expires_at: datetime | None = _time(default=None)
    created_at: datetime = _time(default_factory=now)


class Worker(Watched, table=True):
    __tablename__ = "workers"
    __table_args__ = {"sqlite_autoincrement": True}
    KIND: ClassVar[str] = wire.WORKERS

    # registration
    name: str = Field(unique=True, max_length=253)
    hostname: str
    machine_id: str
    boot_id: str
    run_id: str
    address: str
    port: int
    labels: dict[str, str] = _json()
    system_reserved_ram_bytes: int = Field(sa_type=BigInteger)
    system_reserved_vram_bytes: int = Field(sa_type=BigInteger)
    version: str
    # status: what it has; a change is news
    facts: dict[str, Any] | None = _json_or_null()
    # status: what is measured, without a revision
    cpu_percent: float = 0.0
    memory_used_bytes: int = Field(default=0, sa_type=BigInteger)
    heartbeat_at: datetime | None = _time(default=None)
    # the server's own
    agent_secret: str
    silent: bool = False
    created_at: datetime = _time(default_factory=now)
    updated_at: datetime = _time(default_factory=now, sa_column_kwargs={"onupdate": now})


class Model(Watched, table=True):
    __tablename__ = "models"
    __table_args__ = {"sqlite_autoincrement": True}
    KIND: ClassVar[str] = wire.MODELS

    # spec; `version_id` names the part that instances are started from
    name: str = Field(unique=True, max_length=128)
    description: str | None = None
    replicas: int
    placement_strategy: str
    worker_selector: dict[str, str] = _json()
    restart_on_error: bool
    generation: int = 1
    # the server's own
    deleting: bool = False
    created_at: datetime = _time(default_factory=now)
    updated_at: datetime = _time(default_factory=now, sa_column_kwargs={"onupdate": now})


class ModelVersion(SQLModel, table=True):
    """What instances are started from, as of one generation of a model. Its spec never changes.

    Attributes:
        profile: what the files say; None until they were read.
        problem: why they could not be read, or not in full.
    """

    __tablename__ = "model_versions"
    __table_args__ = (
        UniqueConstraint("model_id", "generation"),
        {"sqlite_autoincrement": True},
    )

    id: int | None = Field(default=None, primary_key=True)
    model_id: int = Field(foreign_key="models.id", ondelete="CASCADE")
    generation: int
    spec: dict[str, Any] = _json()
    created_at: datetime = _time(default_factory=now)
    # the server's own
    profile: dict[str, Any] | None = _json_or_null()
    problem: str = ""


class Instance(Watched, table=True):
    __tablename__ = "model_instances"
    __table_args__ = {"sqlite_autoincrement": True}
    KIND: ClassVar[str] = wire.INSTANCES

    name: str = Field(unique=True, max_length=140)
    model_id: int = Field(foreign_key="models.id", index=True)
    version_id: int = Field(foreign_key="model_versions.id")
    generation: int = 1
    # placement: written once
    worker_id: int | None = Field(default=None, foreign_key="workers.id", index=True)
    claim: dict[str, Any] | None = _json_or_null()
    secret: str | None = None
    # status: the worker that it is placed on
    reported_state: str | None = None
    state_message: str = ""
    observed_generation: int = 0
    port: int | None = None
    pid: int | None = None
    restart_count: int = 0
    download_progress: float | None = None
    # the server's own
    reasons: list[dict[str, Any]] = _json(default_factory=list)
    deleting: bool = False
    replaced_by: int | None = None
    created_at: datetime = _time(default_factory=now)
    updated_at: datetime = _time(default_factory=now, sa_column_kwargs={"onupdate": now})


class Usage(SQLModel, table=True):
    """One finished (or cut) request."""

    __tablename__ = "usage"
    __table_args__ = {"sqlite_autoincrement": True}

    id: int | None = Field(default=None, primary_key=True)
    request_id: str
    credential_id: int | None = None
    user_id: int | None = Field(default=None, index=True)
    model_id: int = Field(index=True)
    model: str
    instance_id: int | None = None
    operation: str
    prompt_tokens: int
    completion_tokens: int
    status: int
    estimated: bool
    cut: bool
    started_at: float
    first_byte_ms: float | None = None
    total_ms: float | None = None


class UsageSpool(SQLModel, table=True):
    """The highest sequence stored of each gateway's spool: what was stored is not added twice."""

    __tablename__ = "usage_spools"

    spool: str = Field(primary_key=True, max_length=32)
    sequence: int = Field(sa_type=BigInteger)


WATCHED: dict[str, type[Watched]] = {
    table.KIND: table for table in (Credential, Worker, Model, Instance)
}
