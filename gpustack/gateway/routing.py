"""From a model to the addresses of its instances, and which of them to try."""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Final

import msgspec

from gpustack.forward.http1 import Headers
from gpustack.forward.upstream import Address
from gpustack.gateway.choice import Candidate, choose
from gpustack.gateway.counts import Counts
from gpustack.gateway.tables import Instance, Model, Tables, Worker
from gpustack.gateway.tunnels import Tunnels, is_tunnel, tunnel_to
from gpustack.lib.backoff import delay_s
from gpustack.lib.decode import UNREADABLE
from gpustack.lib.net import url_host
from gpustack.schemas import wire

logger = logging.getLogger(__name__)

RELAY_REFUSED: Final = wire.RELAY_REFUSED_HEADER.encode()

_REST_FIRST_S: Final = 0.5
_REST_LIMIT_S: Final = 10.0


class Target:
    """One instance that can be dialled.

    Attributes:
        headers: what opens its engine; for an instance elsewhere also says to its relay which.
        certificate: that its relay must show, as PEM; empty: bytes go in clear.
        rests_until: by the event loop's clock; it failed a moment ago.
    """

    __slots__ = (
        "address",
        "certificate",
        "failures",
        "headers",
        "instance_id",
        "last_resort",
        "rests_until",
    )

    def __init__(
        self,
        instance_id: int,
        address: Address,
        headers: Headers,
        *,
        last_resort: bool,
        certificate: str = "",
    ) -> None:
        self.instance_id = instance_id
        self.address = address
        self.certificate = certificate
        self.headers = headers
        self.last_resort = last_resort
        self.failures = 0
        self.rests_until = 0.0

    def failed(self, now: float) -> None:
        self.failures += 1
        self.rests_until = now + delay_s(
            self.failures, first_s=_REST_FIRST_S, limit_s=_REST_LIMIT_S
        )

    def answered(self) -> None:
        self.failures = 0
        self.rests_until = 0.0


class _WorkerCredential(msgspec.Struct):
    worker_id: int


class Routing:
    """The targets of every model, made from the tables when they are first asked for."""

    def __init__(self, counts: Counts, worker_file: Path, tunnels: Tunnels) -> None:
        self.counts = counts
        self._tunnels = tunnels
        self._worker_file = worker_file
        self._targets: dict[int, list[Target]] = {}
        self._known: dict[int, Target] = {}
        self._turn = 0
        self._in_clear: set[int] = set()  # workers that the log has named

    def changed(self) -> None:
        """The tables have changed."""
        self._targets.clear()

    def targets(self, tables: Tables, model: Model) -> list[Target]:
        """The instances of `model` that may answer; those that surely do not are left out."""
        found = self._targets.get(model.id)
        if found is None:
            found = self._targets[model.id] = self._make(tables, model)
        return found

    def choose(self, targets: list[Target], tried: Collection[int], now: float) -> Target | None:
        """The best target that is not in `tried` (instance ids)."""
        if len(targets) == 1 and not tried:
            return targets[0]
        left = [target for target in targets if target.instance_id not in tried]
        candidates = [
            Candidate(self.counts.total(t.instance_id), t.rests_until > now, t.last_resort)
            for t in left
        ]
        self._turn += 1
        index = choose(candidates, self._turn)
        return None if index is None else left[index]

    def _make(self, tables: Tables, model: Model) -> list[Target]:
        local = self._local_worker()
        found = []
        for instance in tables.of_model.get(model.id, {}).values():
            target = _target(tables, instance, local, self._tunnels)
            if target is None:
                self._known.pop(instance.id, None)
                continue
            old = self._known.get(instance.id)
            in_clear = not target.certificate and not is_tunnel(target.address)
            self._warn(instance.worker_id, local, in_clear=in_clear)
            same = old is not None and old.address == target.address
            if old is not None and same and old.certificate == target.certificate:
                target.failures, target.rests_until = old.failures, old.rests_until
            self._known[instance.id] = target
            found.append(target)
        if len(self._known) > 2 * len(tables.instances) + 16:
            self._known = {i: t for i, t in self._known.items() if i in tables.instances}
        return found

    def _warn(self, worker_id: int | None, local: int | None, *, in_clear: bool) -> None:
        """Say once of a worker elsewhere that bytes to it are not encrypted."""
        if worker_id is None or worker_id == local or not in_clear:
            self._in_clear.discard(worker_id or 0)
        elif worker_id not in self._in_clear:
            self._in_clear.add(worker_id)
            logger.warning(
                "requests to worker %d go in clear: it has registered no certificate, since its "
                "version is older than this one; update it",
                worker_id,
            )

    def _local_worker(self) -> int | None:
        """The id of this host's own worker; its file appears when it has registered."""
        try:
            raw = self._worker_file.read_bytes()
            return msgspec.json.decode(raw, type=_WorkerCredential).worker_id
        except FileNotFoundError:
            return None
        except (OSError, *UNREADABLE) as error:
            logger.warning("%s is not readable: %s", self._worker_file, error)
            return None


def _target(
    tables: Tables, instance: Instance, local: int | None, tunnels: Tunnels
) -> Target | None:
    if instance.deleting or instance.port is None or instance.worker_id is None:
        return None
    if instance.state not in ("running", "unreachable"):
        return None
    secret = (instance.secret or "").encode()
    headers: Headers = [(b"authorization", b"Bearer " + secret)]
    certificate, worker = "", None
    if instance.worker_id == local:
        address = ("127.0.0.1", instance.port)
    else:
        worker = tables.workers.get(instance.worker_id)
        if worker is None:
            return None
        address, certificate = (worker.ip, worker.port), worker.certificate
        headers.append((wire.INSTANCE_HEADER.encode(), b"%d" % instance.id))
    headers.append((b"host", f"{url_host(address[0])}:{address[1]}".encode()))
    if worker is not None and _by_tunnel(worker, tunnels):
        address, certificate = tunnel_to(worker.id), ""
    return Target(
        instance.id,
        address,
        headers,
        last_resort=instance.state == "unreachable",
        certificate=certificate,
    )


def _by_tunnel(worker: Worker, tunnels: Tunnels) -> bool:
    """Whether requests go through a tunnel: the worker says so, or nobody could dial it."""
    if worker.proxy_mode == "tunnel":
        return True
    if worker.reached_by != "tunnel":
        return False
    return tunnels.has(worker.id) or tunnels.awaited(worker.id)


def not_ready(tables: Tables, model: Model) -> str:
    """Why no instance of `model` answers, for people to read."""
    states: dict[str, int] = {}
    for instance in tables.of_model.get(model.id, {}).values():
        states[instance.state] = states.get(instance.state, 0) + 1
    if not states:
        return f"Model {model.name} has no instances."
    listed = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return f"No instance of model {model.name} is ready: {listed}."
