"""What happened to an object, why, and by whom."""

from enum import StrEnum

from pydantic import Field

from gpustack.schemas import wire
from gpustack.schemas.base import Schema, Time


class EventKind(StrEnum):
    """Kinds of objects whose events are kept."""

    MODELS = wire.MODELS
    INSTANCES = wire.INSTANCES
    WORKERS = wire.WORKERS
    MODEL_FILES = wire.MODEL_FILES


class EventType(StrEnum):
    """What can happen to an object. Part of the wire contract."""

    CREATED = "created"
    CHANGED = "changed"
    DELETING = "deleting"  # a model: its instances are being ended; a file: it is removed from disk
    GONE = "gone"
    # models
    PROFILE_READ = "profile_read"
    PROFILE_PROBLEM = "profile_problem"
    STALLED = "stalled"  # its instances are not as its spec says, and nothing more is done
    # workers
    REGISTERED = "registered"
    CORDONED = "cordoned"  # it takes no new instances
    DRAINING = "draining"  # nor keeps those that it has
    UNCORDONED = "uncordoned"
    READY = "ready"  # said what it has, or is heard of again; a model file: it is there
    # instances; model files too are downloaded, fail, and are retried
    UNPLACED = "unplaced"  # the codes are those of its reasons
    PLACED = "placed"
    DOWNLOADING = "downloading"
    STARTING = "starting"
    RUNNING = "running"
    ERROR = "error"
    STOPPING = "stopping"
    RETRIED = "retried"  # somebody asked for another start
    REACHABLE = "reachable"  # its worker was silent and is heard of again
    # instances and workers
    RESTARTED = "restarted"  # the engine; the worker's agent
    UNREACHABLE = "unreachable"  # the worker is silent


class ActorKind(StrEnum):
    """Who acts."""

    USER = "user"
    WORKER = "worker"
    GATEWAY = "gateway"
    CONTROLLER = "controller"  # a loop of the server that makes what is what should be
    SERVER = "server"
    NOBODY = "nobody"  # a request without a credential


class By(Schema):
    """Who did it. The name is a user's, a worker's or a controller's; empty for the others."""

    kind: ActorKind
    name: str = ""


class Event(Schema):
    """One thing that happened, or the same thing several times.

    Attributes:
        object_id: of an object that may be gone by now; ids are never used again.
        message: why, or how, for people to read.
        codes: the same for programs.
        count: how often it happened from `first_at` to `last_at`; the message is the last one's.
    """

    id: int
    kind: EventKind
    object_id: int
    name: str
    type: EventType
    message: str
    codes: list[str] = Field(default_factory=list)
    by: By
    count: int
    first_at: Time
    last_at: Time
