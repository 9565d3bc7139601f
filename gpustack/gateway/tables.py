"""What a gateway knows: credentials, models, instances and workers, as the server's watch says.

Only the fields that a gateway needs; msgspec skips the others. No pydantic here: it would cost
each gateway process more memory than the tables do.
"""

from collections.abc import Callable
from datetime import datetime
from sys import intern
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from gpustack.schemas import wire


class Credential(msgspec.Struct, frozen=True):
    """See schemas.credentials.Credential.

    Attributes:
        ends_at: `expires_at` as the system's clock counts; tables set it.
    """

    id: int
    kind: str
    digest: str
    scopes: tuple[str, ...]
    user_id: int | None = None
    worker_id: int | None = None
    allowed_model_names: frozenset[str] | None = None
    expires_at: datetime | None = None
    password_change_required: bool = False
    user_disabled: bool = False
    is_admin: bool = False
    group_ids: frozenset[int] = frozenset()
    ends_at: float | None = None


class Grants(msgspec.Struct, frozen=True):
    """See schemas.access.Grants."""

    user_ids: frozenset[int]
    group_ids: frozenset[int]


class Model(msgspec.Struct, frozen=True):
    """See schemas.access.RoutedModel. One that does not say to whom it is granted is nobody's."""

    id: int
    name: str
    created_at: datetime
    granted_to: Grants | None
    deleting: bool = False


class Instance(msgspec.Struct, frozen=True):
    """See schemas.instances.RoutedInstance."""

    id: int
    model_id: int
    state: str
    worker_id: int | None = None
    port: int | None = None
    secret: str | None = None
    deleting: bool = False


class Worker(msgspec.Struct, frozen=True):
    """See schemas.workers.Worker."""

    id: int
    ip: str
    port: int
    certificate: str = ""
    proxy_mode: str = "direct"
    reached_by: str = "direct"


class Snapshot(msgspec.Struct):
    """The tables as they stand on disk."""

    format: int
    credentials: list[Credential]
    models: list[Model]
    instances: list[Instance]
    workers: list[Worker]


SNAPSHOT_FORMAT: Final = 3

_DECODERS: Final[dict[str, msgspec.json.Decoder[Any]]] = {
    wire.CREDENTIALS: msgspec.json.Decoder(Credential),
    wire.MODELS: msgspec.json.Decoder(Model),
    wire.INSTANCES: msgspec.json.Decoder(Instance),
    wire.WORKERS: msgspec.json.Decoder(Worker),
}

KINDS: Final = tuple(_DECODERS)


class Tables:
    """One consistent set of tables, with the indexes that requests look things up in."""

    def __init__(self) -> None:
        self.credentials: dict[int, Credential] = {}
        self.models: dict[int, Model] = {}
        self.instances: dict[int, Instance] = {}
        self.workers: dict[int, Worker] = {}
        self.by_digest: dict[str, Credential] = {}
        self.by_name: dict[str, Model] = {}
        self.of_model: dict[int, dict[int, Instance]] = {}
        self._scopes: dict[tuple[str, ...], tuple[str, ...]] = {}  # one of all that are equal
        self._put: dict[str, Callable[[Any], None]] = {
            wire.CREDENTIALS: self._put_credential,
            wire.MODELS: self._put_model,
            wire.INSTANCES: self._put_instance,
            wire.WORKERS: self._put_worker,
        }

    def put(self, kind: str, raw: bytes | msgspec.Raw) -> None:
        """Take in an object as it is now.

        Raises:
            msgspec.DecodeError: it is not what this kind looks like.
        """
        decoder = _DECODERS.get(kind)
        if decoder is not None:  # else a kind of a newer server
            self._put[kind](decoder.decode(raw))

    def delete(self, kind: str, id: int) -> None:
        if kind == wire.CREDENTIALS:
            old = self.credentials.pop(id, None)
            if old is not None and self.by_digest.get(old.digest) is old:
                del self.by_digest[old.digest]
        elif kind == wire.MODELS:
            model = self.models.pop(id, None)
            if model is not None and self.by_name.get(model.name) is model:
                del self.by_name[model.name]
        elif kind == wire.INSTANCES:
            instance = self.instances.pop(id, None)
            if instance is not None:
                self.of_model.get(instance.model_id, {}).pop(id, None)
        elif kind == wire.WORKERS:
            self.workers.pop(id, None)

    def _put_credential(self, new: Credential) -> None:
        self.delete(wire.CREDENTIALS, new.id)
        # Most are alike: what requests look at is then in the processor's caches.
        scopes = self._scopes.setdefault(new.scopes, new.scopes)
        ends_at = None if new.expires_at is None else new.expires_at.timestamp()
        new = replace(new, kind=intern(new.kind), scopes=scopes, ends_at=ends_at)
        self.credentials[new.id] = self.by_digest[new.digest] = new

    def _put_model(self, new: Model) -> None:
        self.delete(wire.MODELS, new.id)
        self.models[new.id] = self.by_name[new.name] = new

    def _put_instance(self, new: Instance) -> None:
        self.delete(wire.INSTANCES, new.id)
        self.instances[new.id] = new
        self.of_model.setdefault(new.model_id, {})[new.id] = new

    def _put_worker(self, new: Worker) -> None:
        self.workers[new.id] = new

    # --- on disk -------------------------------------------------------------------------

    def dump(self) -> bytes:
        """The tables as JSON that `load` reads. Secrets are in it."""
        return msgspec.json.encode(
            Snapshot(
                SNAPSHOT_FORMAT,
                list(self.credentials.values()),
                list(self.models.values()),
                list(self.instances.values()),
                list(self.workers.values()),
            )
        )

    @classmethod
    def load(cls, raw: bytes) -> "Tables":
        """The tables that `dump` wrote.

        Raises:
            msgspec.DecodeError: it did not write these.
        """
        snapshot = msgspec.json.decode(raw, type=Snapshot)
        if snapshot.format != SNAPSHOT_FORMAT:
            raise msgspec.DecodeError(f"format {snapshot.format}, want {SNAPSHOT_FORMAT}")
        tables = cls()
        for credential in snapshot.credentials:
            tables._put_credential(credential)
        for model in snapshot.models:
            tables._put_model(model)
        for instance in snapshot.instances:
            tables._put_instance(instance)
        for worker in snapshot.workers:
            tables._put_worker(worker)
        return tables
