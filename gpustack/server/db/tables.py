"""The tables. A row is never input, and never leaves the server: schemas do.

Columns are grouped by who writes them: users (spec), the scheduler (placement), the worker that
an instance is on (status), the server itself. Two groups never share a writer.

One long file: what refers to what, and which change is watched as what, is read best in one place.
"""

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, Column, Index, UniqueConstraint
from sqlmodel import Field, SQLModel

from gpustack.schemas import wire
from gpustack.schemas.credentials import CredentialKind
from gpustack.schemas.models import AccessPolicy
from gpustack.schemas.users import Source
from gpustack.schemas.workers import SCHEDULING_REASON_LIMIT, Scheduling
from gpustack.server.db import types

#: Of what an identity provider says; with its source they fit into MySQL's longest index.
ISSUER_LENGTH, SUBJECT_LENGTH = 400, 320


def now() -> datetime:
    return datetime.now(UTC)


def _json(**options: Any) -> Any:
    return Field(sa_column=Column(JSON, nullable=False), **options)


def _json_or_null() -> Any:
    return Field(default=None, sa_column=Column(JSON(none_as_null=True), nullable=True))


def _time(**options: Any) -> Any:
    return Field(sa_type=types.Time(), **options)


def _text(length: int = 255, **options: Any) -> Any:
    return Field(sa_type=types.Chars(length), **options)


def _prose(**options: Any) -> Any:
    return Field(sa_type=types.Prose(), **options)


def _id(**options: Any) -> Any:
    return Field(sa_type=types.whole(), **options)


def _number(**options: Any) -> Any:
    return Field(sa_type=types.real(), **options)


class Watched(SQLModel):
    """A row whose changes watchers hear of.

    Attributes:
        revision: of the last change. Written by `Database.write` alone.
    """

    KIND: ClassVar[str]
    id: int | None = _id(default=None, primary_key=True)
    revision: int = Field(default=0, sa_type=BigInteger, index=True)

    def key(self) -> tuple[str, int]:
        """Kind and id of a row that has been flushed."""
        if self.id is None:
            raise ValueError(f"this {self.KIND} row has no id before it is flushed")
        return self.KIND, self.id

    def shown_as(self) -> dict[str, int | None]:
        """The kinds that this row is watched as.

        Each with the user who alone hears of it; None: everybody who may watch that kind.
        """
        return {self.KIND: None}


class Cluster(SQLModel, table=True):
    """One row: what makes this cluster this cluster. Made once, under the migration lock.

    Attributes:
        epoch: part of every cursor; new when a backup is restored.
        token_digest: of the secret with which workers register.
    """

    __tablename__ = "cluster"

    id: int = _id(default=1, primary_key=True)
    cluster_id: str = _text()
    epoch: str = _text()
    token_digest: str = _text()


class Counter(SQLModel, table=True):
    """One row: the revision of the last committed change."""

    __tablename__ = "counter"

    id: int = _id(default=1, primary_key=True)
    revision: int = Field(sa_type=BigInteger)


class Change(SQLModel, table=True):
    """The bounded history that watches resume from.

    Attributes:
        user_id: who alone may hear of it; None: everybody who may watch the kind. What is deleted
            has no other trace of whose it was.
    """

    __tablename__ = "changes"

    revision: int = Field(
        sa_type=BigInteger, primary_key=True, sa_column_kwargs={"autoincrement": False}
    )
    kind: str = _text(32, primary_key=True)
    object_id: int = _id(primary_key=True, sa_column_kwargs={"autoincrement": False})
    deleted: bool
    user_id: int | None = _id(default=None)


class User(SQLModel, table=True):
    """Who may log in.

    Attributes:
        source: where the user comes from; only a local one has a password.
        password_hash: empty: no password opens anything.
    """

    __tablename__ = "users"
    __table_args__ = {"sqlite_autoincrement": True}

    id: int | None = _id(default=None, primary_key=True)
    username: str = _text(128, unique=True)
    full_name: str | None = _text(default=None)
    password_hash: str = _text()
    is_admin: bool = False
    require_password_change: bool = False
    is_active: bool = True
    source: str = _text(16, default=Source.LOCAL)
    avatar_url: str | None = _prose(default=None)
    generation: int = 1
    created_at: datetime = _time(default_factory=now)


class Identity(SQLModel, table=True):
    """By what an identity provider knows a user. Never changed.

    Attributes:
        source: what the provider speaks: its names of one kind are not those of another.
    """

    __tablename__ = "identities"
    __table_args__ = (
        UniqueConstraint("source", "issuer", "subject"),
        {"sqlite_autoincrement": True},
    )

    id: int | None = _id(default=None, primary_key=True)
    user_id: int = _id(foreign_key="users.id", ondelete="CASCADE", index=True)
    source: str = _text(16)
    issuer: str = _text(ISSUER_LENGTH)
    subject: str = _text(SUBJECT_LENGTH)
    created_at: datetime = _time(default_factory=now)


class SamlMessage(SQLModel, table=True):
    """A message of an identity provider that was taken, so that no server takes it again.

    Attributes:
        digest: of the message's id.
        ends_at: it proves nothing from then on.
        request_id: of the request that it answers.
        ticket: digest of what the browser that brought it comes back with; None: it did.
        content: what is needed of it until then.
    """

    __tablename__ = "saml_messages"

    digest: str = _text(64, primary_key=True)
    ends_at: datetime = _time(index=True)
    request_id: str = _text(65, default="")
    ticket: str | None = _text(64, default=None, index=True)
    content: dict[str, Any] = _json(default_factory=dict)


class Credential(Watched, table=True):
    """Every secret that opens something, by its SHA-256 digest.

    Attributes:
        worker_id: whose it is; of a join token: the worker that has used it up.
        reusable: of a join token.
        allowed_model_names: an API key runs no others; None: all.
        generation: of what its user says of an API key.
        last_used_at: of an API key; to within some seconds, and no change of it.
        provider_session: of a session: what its identity provider needs to end its own.
    """

    __tablename__ = "credentials"
    __table_args__ = {"sqlite_autoincrement": True}
    KIND: ClassVar[str] = wire.CREDENTIALS

    kind: str = _text(16)
    digest: str = _text(64, unique=True)
    name: str = _text(default="")
    description: str | None = _prose(default=None)
    prefix: str = _text(default="")
    user_id: int | None = _id(default=None, foreign_key="users.id", index=True)
    worker_id: int | None = _id(default=None, foreign_key="workers.id", index=True)
    scopes: list[str] = _json()
    allowed_model_names: list[str] | None = _json_or_null()
    expires_at: datetime | None = _time(default=None)
    last_used_at: datetime | None = _time(default=None)
    reusable: bool = False
    provider_session: dict[str, Any] | None = _json_or_null()
    generation: int = 1
    created_at: datetime = _time(default_factory=now)

    def shown_as(self) -> dict[str, int | None]:
        if self.kind == CredentialKind.JOIN:  # it opens nothing that gateways guard
            return {}
        if self.kind != CredentialKind.KEY or self.user_id is None:
            return super().shown_as()
        return super().shown_as() | {wire.API_KEYS: self.user_id}


class Worker(Watched, table=True):
    """A machine that runs an agent.

    Attributes:
        silent: it has not been heard of for so long that what is on it is unreachable.
        lost: it has been silent for longer than the grace period.
        grace_ends_at: when a silent one becomes lost, for people to read; None: it is not silent.
    """

    __tablename__ = "workers"
    __table_args__ = {"sqlite_autoincrement": True}
    KIND: ClassVar[str] = wire.WORKERS

    # spec: administrators
    admin_labels: dict[str, str] = _json(default_factory=dict)
    scheduling: str = _text(16, default=Scheduling.ACTIVE)
    scheduling_reason: str = _text(SCHEDULING_REASON_LIMIT, default="")
    generation: int = 1
    # registration
    name: str = _text(253, unique=True)
    hostname: str = _text()
    machine_id: str = _text()
    boot_id: str = _text()
    run_id: str = _text()
    ip: str = _text()
    port: int
    labels: dict[str, str] = _json()
    system_reserved_ram_bytes: int = Field(sa_type=BigInteger)
    system_reserved_vram_bytes: int = Field(sa_type=BigInteger)
    version: str = _text()
    certificate: str = _text(2048)  # what its port shows, as PEM; empty: it speaks no TLS
    proxy_mode: str = _text(16, default="direct")
    # status: what it has; a change is news
    facts: dict[str, Any] | None = _json_or_null()
    # status: what is measured, without a revision
    cpu_percent: float = _number(default=0.0)
    memory_used_bytes: int = Field(default=0, sa_type=BigInteger)
    host_used: dict[str, Any] | None = _json_or_null()  # swap, uptime, disks
    devices_used: list[dict[str, Any]] = _json(default_factory=list)  # in the order of its devices
    gpu_percent: float | None = _number(default=None)  # of its devices on average
    vram_used_bytes: int = Field(default=0, sa_type=BigInteger)
    heartbeat_at: datetime | None = _time(default=None)
    # the server's own
    agent_secret: str = _text()
    silent: bool = Field(default=False, index=True)
    lost: bool = False
    grace_ends_at: datetime | None = _time(default=None)
    unreached: str = _text(default="")  # why the server cannot dial its port; empty: it can
    created_at: datetime = _time(default_factory=now)
    updated_at: datetime = _time(default_factory=now, sa_column_kwargs={"onupdate": now})


class Device(SQLModel, table=True):
    """A GPU or NPU, as its worker's facts have it. The same transaction writes both.

    Attributes:
        position: among the worker's devices.
        type: never empty, since ids are made of it.
    """

    __tablename__ = "devices"
    __table_args__ = (
        UniqueConstraint("worker_id", "position"),
        {"sqlite_autoincrement": True},
    )

    id: int | None = _id(default=None, primary_key=True)
    worker_id: int = _id(foreign_key="workers.id", ondelete="CASCADE")
    position: int
    index: int
    name: str = _text()
    vendor: str = _text()
    type: str = _text()
    uuid: str = _text()
    memory_total_bytes: int = Field(sa_type=BigInteger)


class LoadSample(SQLModel, table=True):
    """How busy all workers were together in one minute, percent; None: there was none such.

    Attributes:
        minute: since the epoch.
    """

    __tablename__ = "load_samples"

    minute: int = _id(primary_key=True, sa_column_kwargs={"autoincrement": False})
    cpu: float | None = _number(default=None)
    ram: float | None = _number(default=None)
    gpu: float | None = _number(default=None)
    vram: float | None = _number(default=None)


class Model(Watched, table=True):
    """What a user deploys.

    Attributes:
        rollout_message: why its instances are not as its spec says although nothing is under way.
    """

    __tablename__ = "models"
    __table_args__ = {"sqlite_autoincrement": True}
    KIND: ClassVar[str] = wire.MODELS

    # spec; the part that instances are started from is the newest of its versions
    name: str = _text(128, unique=True)
    description: str | None = _prose(default=None)
    replicas: int
    placement_strategy: str = _text()
    worker_selector: dict[str, str] = _json()
    restart_on_error: bool
    access_policy: str = _text(16, default=AccessPolicy.AUTHED)
    generation: int = 1
    # the server's own
    rollout_message: str = _text(1000, default="")
    deleting: bool = False
    created_at: datetime = _time(default_factory=now)
    updated_at: datetime = _time(default_factory=now, sa_column_kwargs={"onupdate": now})


class Group(SQLModel, table=True):
    """Users to whom models are granted together."""

    __tablename__ = "user_groups"
    __table_args__ = {"sqlite_autoincrement": True}

    id: int | None = _id(default=None, primary_key=True)
    name: str = _text(128, unique=True)
    description: str | None = _prose(default=None)
    generation: int = 1
    created_at: datetime = _time(default_factory=now)


class GroupMember(SQLModel, table=True):
    """A user in a group. What the user's credentials stand for depends on it."""

    __tablename__ = "group_members"

    group_id: int = _id(primary_key=True, foreign_key="user_groups.id", ondelete="CASCADE")
    user_id: int = _id(primary_key=True, foreign_key="users.id", ondelete="CASCADE", index=True)


class ModelUser(SQLModel, table=True):
    """A model that is granted to a user. Watchers see it in the model: whoever changes it touches
    that."""

    __tablename__ = "model_users"

    model_id: int = _id(primary_key=True, foreign_key="models.id", ondelete="CASCADE")
    user_id: int = _id(primary_key=True, foreign_key="users.id", ondelete="CASCADE", index=True)


class ModelGroup(SQLModel, table=True):
    """A model that is granted to a group. Watchers see it in the model: whoever changes it touches
    that."""

    __tablename__ = "model_groups"

    model_id: int = _id(primary_key=True, foreign_key="models.id", ondelete="CASCADE")
    group_id: int = _id(
        primary_key=True, foreign_key="user_groups.id", ondelete="CASCADE", index=True
    )


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

    id: int | None = _id(default=None, primary_key=True)
    model_id: int = _id(foreign_key="models.id", ondelete="CASCADE")
    generation: int
    spec: dict[str, Any] = _json()
    created_at: datetime = _time(default_factory=now)
    # the server's own
    profile: dict[str, Any] | None = _json_or_null()
    problem: str = _prose(default="")


class Instance(Watched, table=True):
    """One copy of a model.

    Attributes:
        lost: a worker of it was silent for longer than the grace period, and what has become of it
            has not been said since.
        replaced_by: the instance that was made in its place while it was lost.
        fallback_version_id: the version whose instance was stopped to make room for this one; it
            is placed again if this one does not fit.
    """

    __tablename__ = "model_instances"
    __table_args__ = (
        # All that a rollout counts: no row is read for it.
        Index(
            "ix_model_instances_counts",
            "model_id", "version_id", "deleting", "lost", "reported_state", "worker_id",
        ),
        {"sqlite_autoincrement": True},
    )  # fmt: skip
    KIND: ClassVar[str] = wire.INSTANCES

    name: str = _text(140, unique=True)
    model_id: int = _id(foreign_key="models.id")
    version_id: int = _id(foreign_key="model_versions.id")
    generation: int = 1
    # placement: written once; a distributed instance's claims are its members'
    worker_id: int | None = _id(default=None, foreign_key="workers.id", index=True)
    claim: dict[str, Any] | None = _json_or_null()
    secret: str | None = _text(default=None)
    # status: the worker that it is placed on
    reported_state: str | None = _text(default=None)
    state_message: str = _prose(default="")
    observed_generation: int = 0
    port: int | None = None
    pid: int | None = None
    restart_count: int = 0
    download_progress: float | None = _number(default=None)
    # the server's own
    reasons: list[dict[str, Any]] = _json(default_factory=list)
    deleting: bool = False
    lost: bool = False
    replaced_by: int | None = _id(default=None)
    fallback_version_id: int | None = _id(default=None)
    created_at: datetime = _time(default_factory=now)
    updated_at: datetime = _time(default_factory=now, sa_column_kwargs={"onupdate": now})


class Member(SQLModel, table=True):
    """The part of a distributed instance on one worker. An instance on one worker has no members.

    Watchers see it in its instance: whoever changes a member touches that.
    """

    __tablename__ = "members"
    __table_args__ = (
        UniqueConstraint("instance_id", "rank"),
        {"sqlite_autoincrement": True},
    )

    id: int | None = _id(default=None, primary_key=True)
    # placement: written once; rank 0 is on the instance's own worker and answers requests
    instance_id: int = _id(foreign_key="model_instances.id", ondelete="CASCADE")
    rank: int
    worker_id: int = _id(foreign_key="workers.id", index=True)
    claim: dict[str, Any] = _json()
    # status: the worker that it is placed on
    ports: dict[str, int] = _json(default_factory=dict)
    reported_state: str | None = _text(default=None)
    state_message: str = _prose(default="")
    observed_generation: int = 0
    pid: int | None = None
    restart_count: int = 0
    download_progress: float | None = _number(default=None)


class ModelFile(Watched, table=True):
    """The files of one source on one worker.

    Attributes:
        source_digest: of the source: a worker has each once.
    """

    __tablename__ = "model_files"
    __table_args__ = (
        UniqueConstraint("worker_id", "source_digest"),
        {"sqlite_autoincrement": True},
    )
    KIND: ClassVar[str] = wire.MODEL_FILES

    # spec: administrators, or the worker that needs it; all but the generation never changes
    worker_id: int = _id(foreign_key="workers.id")
    source: str = _text(32)
    huggingface_repo_id: str | None = _text(default=None)
    huggingface_filename: str | None = _text(1024, default=None)
    local_path: str | None = _text(1024, default=None)
    source_digest: str = _text(64)
    generation: int = 1
    # status: the worker that it is on
    reported_state: str | None = _text(16, default=None)
    state_message: str = _prose(default="")
    observed_generation: int = 0
    size: int | None = Field(default=None, sa_type=BigInteger)
    download_progress: float | None = _number(default=None)
    resolved_paths: list[str] = _json(default_factory=list)
    # the server's own
    deleting: bool = False
    created_at: datetime = _time(default_factory=now)
    updated_at: datetime = _time(default_factory=now, sa_column_kwargs={"onupdate": now})

    @property
    def name(self) -> str:
        """What events and the audit log call it."""
        file = f":{self.huggingface_filename}" if self.huggingface_filename else ""
        return (self.local_path or f"{self.huggingface_repo_id}{file}")[:255]


class Usage(SQLModel, table=True):
    """One finished (or cut) request."""

    __tablename__ = "usage"
    __table_args__ = {"sqlite_autoincrement": True}

    id: int | None = _id(default=None, primary_key=True)
    request_id: str = _text()
    credential_id: int | None = _id(default=None)
    user_id: int | None = _id(default=None, index=True)
    model_id: int = _id(index=True)
    model: str = _text()
    instance_id: int | None = _id(default=None)
    operation: str = _text()
    prompt_tokens: int
    completion_tokens: int
    status: int
    estimated: bool
    cut: bool
    started_at: float = _number(index=True)
    first_byte_ms: float | None = _number(default=None)
    total_ms: float | None = _number(default=None)


class UsageHour(SQLModel, table=True):
    """The sums of one hour's requests that are alike. What adds a request adds it here too.

    Attributes:
        hour: since the epoch, UTC.
        model: what it was called last in that hour.
        user_id, credential_id: 0: none.
        failed: requests whose answer was an error.
    """

    __tablename__ = "usage_hours"
    __table_args__ = (
        UniqueConstraint("hour", "model_id", "user_id", "credential_id", "operation"),
        {"sqlite_autoincrement": True},
    )

    id: int | None = _id(default=None, primary_key=True)
    hour: int = _id()
    model_id: int = _id()
    model: str = _text()
    user_id: int = _id()
    credential_id: int = _id()
    operation: str = _text(64)
    requests: int = Field(sa_type=BigInteger)
    failed: int = Field(sa_type=BigInteger)
    prompt_tokens: int = Field(sa_type=BigInteger)
    completion_tokens: int = Field(sa_type=BigInteger)


class UsageSpool(SQLModel, table=True):
    """The highest sequence stored of each gateway's spool: what was stored is not added twice."""

    __tablename__ = "usage_spools"

    spool: str = _text(32, primary_key=True)
    sequence: int = Field(sa_type=BigInteger)


class Event(SQLModel, table=True):
    """One thing that happened to an object, or the same thing several times. Outlives the object.

    Attributes:
        alike: digest of what makes two of them the same.
        by_kind, by_name: who did it.
    """

    __tablename__ = "events"
    __table_args__ = (
        Index("ix_events_object", "kind", "object_id"),
        {"sqlite_autoincrement": True},
    )

    id: int | None = _id(default=None, primary_key=True)
    kind: str = _text(32)
    object_id: int = _id()
    name: str = _text()
    type: str = _text(32)
    message: str = _prose()
    codes: list[str] = _json()
    by_kind: str = _text(16)
    by_name: str = _text()
    alike: str = _text(64, index=True)
    count: int = 1
    first_at: datetime = _time()
    last_at: datetime = _time(index=True)


class AuditEntry(SQLModel, table=True):
    """One administrative change. Never changed; removed only from the oldest on.

    Attributes:
        changed: JSON as text, since databases rewrite JSON and the hash covers every character.
        previous: hash of the entry before.
        hash: of all other columns.
    """

    __tablename__ = "audit_log"

    id: int = _id(primary_key=True, sa_column_kwargs={"autoincrement": False})
    at: datetime = _time(default_factory=now)
    user_id: int | None = _id(default=None)
    username: str = _text(128)
    credential_kind: str = _text(16)
    credential_name: str = _text()
    peer: str = _text()
    action: str = _text(16)
    kind: str = _text(32)
    object_id: int | None = _id(default=None)
    name: str = _text()
    changed: str = _prose()
    remark: str = _prose()
    previous: str = _text(64)
    hash: str = _text(64)


class AuditChain(SQLModel, table=True):
    """One row: the ends of the audit log. Whoever writes an entry holds it.

    Attributes:
        pruned_id, pruned_hash: of the entry that the oldest one left follows.
        last_id, last_hash: of the newest entry.
    """

    __tablename__ = "audit_chain"

    id: int = _id(default=1, primary_key=True)
    pruned_id: int = _id(default=0)
    pruned_hash: str = _text(64, default="")
    last_id: int = _id(default=0)
    last_hash: str = _text(64, default="")


class Lease(SQLModel, table=True):
    """One row: which server controls.

    Attributes:
        holder: a node. What it does is its business only with `token`, which grows with each term.
        renewed_at: by the database's clock.
    """

    __tablename__ = "leases"

    name: str = _text(32, primary_key=True)
    holder: str = _text(64)
    token: int = Field(sa_type=BigInteger)
    renewed_at: datetime = _time()


#: Kind -> its table, for the rows that take revisions.
WATCHED: dict[str, type[Watched]] = {
    table.KIND: table for table in (Credential, Worker, Model, Instance, ModelFile)
}
#: Every kind that can be watched: API keys are what users see of their credentials.
KINDS: dict[str, type[Watched]] = WATCHED | {wire.API_KEYS: Credential}
