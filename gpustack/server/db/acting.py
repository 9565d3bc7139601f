"""Who acts. Whatever a transaction changes is said to be this actor's doing."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from gpustack.schemas.events import ActorKind


@dataclass(frozen=True, slots=True)
class Actor:
    """Somebody who changes things.

    Attributes:
        name: of a user or a controller. A worker's is read when it is needed.
        credential_kind, credential_name: what a user showed.
        peer: address that the request came from.
    """

    kind: ActorKind
    name: str = ""
    user_id: int | None = None
    worker_id: int | None = None
    credential_kind: str = ""
    credential_name: str = ""
    peer: str = ""

    @property
    def is_outside(self) -> bool:
        """Whether a person may be behind it: what such an actor changes is audited."""
        return self.kind in {ActorKind.USER, ActorKind.NOBODY}


_SERVER = Actor(ActorKind.SERVER)
_actor: ContextVar[Actor] = ContextVar("actor", default=_SERVER)


def actor() -> Actor:
    """Who acts in this task."""
    return _actor.get()


def become(who: Actor) -> None:
    """From now on `who` acts in this task, and in tasks that it starts."""
    _actor.set(who)


@contextmanager
def acting(who: Actor) -> Iterator[None]:
    """`who` acts inside, or whom it becomes there."""
    token = _actor.set(who)
    try:
        yield
    finally:
        _actor.reset(token)
