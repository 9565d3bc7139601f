"""An instance: one copy of a model."""

from enum import StrEnum
from typing import Annotated, Final

from pydantic import Field, Strict

from gpustack.schemas.base import Body, Schema, Time
from gpustack.schemas.models import VersionSpec
from gpustack.schemas.placements import Claim, Reason


class InstanceState(StrEnum):
    PENDING = "pending"  # no worker chosen yet; `reasons` says why
    SCHEDULED = "scheduled"  # a worker is chosen and has not yet said anything
    DOWNLOADING = "downloading"  # the worker fetches the model's files
    STARTING = "starting"  # the engine's process is there and has answered no request yet
    RUNNING = "running"  # the engine has answered a real request
    ERROR = "error"  # the engine failed; state_message has its last words; tried again later
    STOPPING = "stopping"  # to be gone: the engine is being ended
    UNREACHABLE = "unreachable"  # its worker is silent; the engine may well be running
    GONE = "gone"  # the worker ended every process of it; the row goes with this report


_NEXT: Final[dict[InstanceState, frozenset[InstanceState]]] = {
    InstanceState.PENDING: frozenset({InstanceState.SCHEDULED, InstanceState.GONE}),
    InstanceState.SCHEDULED: frozenset({InstanceState.DOWNLOADING, InstanceState.STARTING}),
    InstanceState.DOWNLOADING: frozenset({InstanceState.STARTING}),
    InstanceState.STARTING: frozenset({InstanceState.RUNNING, InstanceState.DOWNLOADING}),
    InstanceState.RUNNING: frozenset({InstanceState.STARTING}),
    InstanceState.ERROR: frozenset({InstanceState.STARTING, InstanceState.DOWNLOADING}),
    InstanceState.STOPPING: frozenset({InstanceState.GONE}),
    InstanceState.UNREACHABLE: frozenset(InstanceState) - {InstanceState.PENDING},
    InstanceState.GONE: frozenset(),
}

#: States from which an engine may fail, stop answering the server, or be told to go.
_PLACED: Final = frozenset(
    {
        InstanceState.SCHEDULED,
        InstanceState.DOWNLOADING,
        InstanceState.STARTING,
        InstanceState.RUNNING,
        InstanceState.ERROR,
    }
)


def can_move(old: InstanceState, new: InstanceState) -> bool:
    """Whether `old -> new` is legal. Every state may repeat itself."""
    if old is new or new in _NEXT[old]:
        return True
    if new is InstanceState.STOPPING:
        return old is not InstanceState.GONE
    if new is InstanceState.GONE:
        return old in _PLACED  # a worker that stopped it before it could say so
    return old in _PLACED and new in {InstanceState.ERROR, InstanceState.UNREACHABLE}


class InstanceStatus(Body):
    """What the worker that an instance is placed on says of it. It is the only writer.

    Attributes:
        observed_generation: the generation of the instance that this report is about.
        port: loopback port the engine listens on.
        restart_count: starts after the first.
    """

    state: Annotated[InstanceState, Strict(False)]
    state_message: str = ""
    observed_generation: int = 0
    port: int | None = None
    pid: int | None = None
    restart_count: int = 0
    download_progress: float | None = Field(None, ge=0, le=100)


class Member(Schema):
    """The part of a distributed instance on one worker.

    Attributes:
        rank: 0 is the part that answers requests; it is on the instance's own worker.
        ports: what for -> port that this part listens on.
    """

    rank: int
    worker_id: int
    worker_name: str
    claim: Claim
    ports: dict[str, int] = Field(default_factory=dict)
    state: InstanceState
    state_message: str = ""
    observed_generation: int = 0
    pid: int | None = None
    restart_count: int = 0
    download_progress: float | None = None


class Instance(Schema):
    """An instance as users see it.

    Attributes:
        model_generation: the model's generation whose version it runs.
        generation: counts changes of what it should be (a retry, its deletion).
        reasons: while pending, one per worker that was looked at.
        replaced_by: the instance that was made in its place while its worker was silent.
        members: the parts of one that is on several workers, by rank; they have the claims then.
    """

    id: int
    name: str
    model_id: int
    model_name: str
    model_generation: int
    generation: int
    worker_id: int | None = None
    worker_name: str | None = None
    worker_ip: str | None = None
    state: InstanceState
    state_message: str = ""
    reasons: list[Reason] = Field(default_factory=list)
    claim: Claim | None = None
    members: list[Member] = Field(default_factory=list)
    port: int | None = None
    pid: int | None = None
    restart_count: int = 0
    download_progress: float | None = None
    observed_generation: int = 0
    deleting: bool = False
    replaced_by: int | None = None
    created_at: Time
    updated_at: Time


class RoutedInstance(Instance):
    """An instance as gateways see it: with the secret that its engine asks for."""

    secret: str | None = None


class AssignedInstance(RoutedInstance):
    """An instance as the worker that it is placed on sees it: all it takes to run it.

    Attributes:
        drain: when it is to go, the requests that it is answering may end first.
    """

    spec: VersionSpec
    restart_on_error: bool = True
    drain: bool = False


def shown_state(
    *, placed: bool, deleting: bool, unreachable: bool, reported: InstanceState | None
) -> InstanceState:
    """The state a user sees, from the server's own facts and the worker's report."""
    if deleting:
        return InstanceState.STOPPING
    if not placed:
        return InstanceState.PENDING
    if unreachable:
        return InstanceState.UNREACHABLE
    return reported or InstanceState.SCHEDULED
