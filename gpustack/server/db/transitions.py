"""PURE: from what changed of a row to what happened to its object.

The one place that makes events. Handlers and controllers change rows and know nothing of it, so
none of them can forget to say what they did.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from gpustack.lib.net import url_host
from gpustack.lib.units import gib
from gpustack.schemas import wire
from gpustack.schemas.events import EventType
from gpustack.schemas.instances import InstanceState
from gpustack.schemas.model_files import ModelFileState
from gpustack.schemas.workers import Scheduling
from gpustack.server.db.diffs import Diff
from gpustack.server.db.tables import Instance, Model, ModelFile, ModelVersion, Worker

#: A cluster may have a thousand workers, each with its reason.
REASONS_SHOWN = 3
#: An engine's last words are longer than what one reads of an event.
MESSAGE_LIMIT = 2000

_MODEL_SPEC = (
    "name", "description", "replicas", "placement_strategy", "worker_selector", "restart_on_error",
    "access_policy",
)  # fmt: skip
_REGISTRATION = (
    "name", "hostname", "machine_id", "ip", "port", "labels", "system_reserved_ram_bytes",
    "system_reserved_vram_bytes", "version", "proxy_mode",
)  # fmt: skip
#: Numbers that differ each time the same thing happens; how a process ended is not one of them.
_VARYING = re.compile(r"(?<!code )(?<!signal )\d[\d.]*")


@dataclass(frozen=True, slots=True)
class Happening:
    """What happened to one object, once."""

    kind: str
    object_id: int
    name: str
    type: EventType
    message: str = ""
    codes: tuple[str, ...] = ()

    def alike(self) -> str:
        """The same for what counts as the same thing again.

        That is the codes or, without any, the first line of the message less its numbers: below
        it stands what an engine said last, which is never the same twice.
        """
        why = ",".join(self.codes) or _VARYING.sub("#", self.message.partition("\n")[0])
        return f"{self.kind}/{self.object_id}/{self.type}/{why}"


@dataclass(frozen=True, slots=True)
class Around:
    """What a change is told with.

    Attributes:
        workers: names by id, of the workers that rows refer to; those deleted now are not there.
        models: the models that versions belong to, by id.
        renewed: models that got a version now.
        on_worker: the instances of each worker that fell silent or is heard of again.
        why: instances are made or stopped now, by their names.
    """

    workers: Mapping[int, str] = field(default_factory=dict)
    models: Mapping[int, Model] = field(default_factory=dict)
    renewed: Set[int] = frozenset()
    on_worker: Mapping[int, Sequence[Instance]] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)


def happenings(diff: Diff, around: Around) -> Iterator[Happening]:
    """What happened to the diff's object, and to those that are seen otherwise because of it."""
    tell = _TELLERS.get(type(diff.row))
    return tell(diff, around) if tell else iter(())


# --- models --------------------------------------------------------------------------------


def _model(diff: Diff, around: Around) -> Iterator[Happening]:
    row: Model = diff.row
    about = _about(wire.MODELS, row)
    if diff.made:
        yield about(EventType.CREATED)
    elif diff.gone:
        yield about(EventType.GONE, "its last instance is gone")
    elif diff.changed("deleting"):
        yield about(EventType.DELETING)
    elif diff.changed("rollout_message") and row.rollout_message:
        yield about(EventType.STALLED, row.rollout_message)
    elif diff.changed("generation"):
        changes = [_change(diff, name) for name in _MODEL_SPEC if diff.changed(name)]
        if row.id in around.renewed:
            changes.append("what its instances are started from")
        yield about(EventType.CHANGED, f"generation {row.generation}: {'; '.join(changes)}")


def _change(diff: Diff, name: str) -> str:
    if name == "description":  # as long as a text may be
        return name
    return f"{name} {diff.was(name)} -> {getattr(diff.row, name)}"


def _version(diff: Diff, around: Around) -> Iterator[Happening]:
    row: ModelVersion = diff.row
    model = around.models.get(row.model_id)
    if diff.made or diff.gone or model is None:
        return
    about = _about(wire.MODELS, model)
    if diff.changed("profile"):
        source = (row.profile or {}).get("source", "")
        yield about(EventType.PROFILE_READ, f"generation {row.generation}: from {source}")
    if diff.changed("problem") and row.problem:
        yield about(EventType.PROFILE_PROBLEM, row.problem)


# --- workers -------------------------------------------------------------------------------


def _worker(diff: Diff, around: Around) -> Iterator[Happening]:
    row: Worker = diff.row
    about = _about(wire.WORKERS, row)
    if diff.made:
        yield about(EventType.REGISTERED, f"at {url_host(row.ip)}:{row.port}")
        return
    if diff.gone:
        yield about(EventType.GONE)
        return
    if diff.changed("agent_secret"):
        yield about(EventType.REGISTERED, f"again, at {url_host(row.ip)}:{row.port}")
    elif diff.changed("run_id"):
        what = "its machine" if diff.changed("boot_id") else "its agent"
        yield about(EventType.RESTARTED, f"{what} was started again")
    if diff.changed("silent"):
        yield from _silence(row, about, around)
    elif diff.changed("facts") and diff.was("facts") is None:
        yield about(EventType.READY, "it has said what it has")
    elif diff.changed("facts"):
        before, after = diff.was("facts"), row.facts or {}
        names = sorted(name for name in after if before.get(name) != after[name])
        yield about(EventType.CHANGED, f"what it has: {', '.join(names)}")
    if diff.changed("unreached"):
        how = f"cannot be reached ({row.unreached})" if row.unreached else "can be reached again"
        yield about(EventType.CHANGED, f"{row.ip}:{row.port} {how}")
    if names := [name for name in _REGISTRATION if diff.changed(name)]:
        yield about(EventType.CHANGED, ", ".join(names))
    if diff.changed("scheduling", "scheduling_reason"):
        yield about(_SCHEDULED[Scheduling(row.scheduling)], row.scheduling_reason)
    if diff.changed("admin_labels"):
        was = _labels(diff.was("admin_labels"))
        yield about(
            EventType.CHANGED, f"labels from administrators {was} -> {_labels(row.admin_labels)}"
        )


_SCHEDULED = {
    Scheduling.ACTIVE: EventType.UNCORDONED,
    Scheduling.CORDONED: EventType.CORDONED,
    Scheduling.DRAINING: EventType.DRAINING,
}


def _silence(row: Worker, about: "_About", around: Around) -> Iterator[Happening]:
    """A worker's silence is its instances' as well."""
    silent = row.silent
    kind = EventType.UNREACHABLE if silent else EventType.READY
    yield about(kind, "it is silent" if silent else "it is heard of again")
    for instance in around.on_worker.get(row.id or 0, ()):
        of_it = EventType.UNREACHABLE if silent else EventType.REACHABLE
        how = "is silent" if silent else "is heard of again"
        yield _about(wire.INSTANCES, instance)(of_it, f"worker {row.name} {how}")


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items())) or "none"


# --- instances -----------------------------------------------------------------------------


def _instance(diff: Diff, around: Around) -> Iterator[Happening]:
    row: Instance = diff.row
    about = _about(wire.INSTANCES, row)
    worker = around.workers.get(row.worker_id or 0)
    if diff.gone:
        yield about(EventType.GONE, _end(row, worker))
        return
    if diff.made:
        yield about(EventType.CREATED, around.why.get(row.name, ""))
    if diff.was("worker_id") != row.worker_id or (diff.made and worker):
        yield about(EventType.PLACED, f"on worker {worker}{_reserved(row.claim)}")
    elif diff.changed("reasons") and row.reasons:
        codes = tuple(sorted({reason["code"] for reason in row.reasons}))
        yield about(EventType.UNPLACED, _sentence(row.reasons), codes)
    yield from _reported(diff, about)
    if diff.changed("deleting"):
        yield about(EventType.STOPPING, around.why.get(row.name, ""))
    elif diff.changed("generation"):
        yield about(EventType.RETRIED)


def _reserved(claim: Mapping[str, Any] | None) -> str:
    """What it fitted there with; members have the claims of an instance on several workers."""
    if claim is None:
        return ""
    ram, vram = claim.get("ram_bytes", 0), claim.get("vram_bytes", {})
    parts = [f"{gib(ram)} of memory"] if ram else []
    parts += [f"{gib(size)} of GPU {index}" for index, size in vram.items()]
    return f", which has {' and '.join(parts)} for it" if parts else ""


def _end(row: Instance, worker: str | None) -> str:
    if row.worker_id is None:
        return "it was on no worker"
    return f"nothing of it runs on worker {worker} any more" if worker else "with its worker"


def _reported(diff: Diff, about: "_About") -> Iterator[Happening]:
    """What its worker says of it, once the server has not told it otherwise."""
    row: Instance = diff.row
    state, failed = row.reported_state, InstanceState.ERROR
    news = diff.changed("reported_state") or (state == failed and diff.changed("state_message"))
    if diff.changed("restart_count") and row.restart_count > diff.was("restart_count"):
        yield about(EventType.RESTARTED, f"start {row.restart_count + 1}")
        news = news and state != InstanceState.STARTING
    if news and state in _REPORTED and not row.deleting:
        yield about(EventType(state), row.state_message)


_REPORTED = {
    InstanceState.DOWNLOADING, InstanceState.STARTING, InstanceState.RUNNING, InstanceState.ERROR
}  # fmt: skip


def _sentence(reasons: Sequence[Mapping[str, Any]]) -> str:
    said = [f"{one['worker']}: {one['message']}" if one["worker"] else one["message"]
            for one in reasons[:REASONS_SHOWN]]  # fmt: skip
    if more := len(reasons) - len(said):
        said.append(f"and {more} more")
    return "; ".join(said)


# --- model files ---------------------------------------------------------------------------


def _file(diff: Diff, around: Around) -> Iterator[Happening]:
    row: ModelFile = diff.row
    about = _about(wire.MODEL_FILES, row)
    worker = around.workers.get(row.worker_id)
    state, failed = row.reported_state, ModelFileState.ERROR
    if diff.gone:
        yield about(EventType.GONE, f"from worker {worker}" if worker else "with its worker")
    elif diff.made:
        yield about(EventType.CREATED, f"on worker {worker}")
    elif diff.changed("deleting"):
        yield about(EventType.DELETING)
    elif diff.changed("generation"):
        yield about(EventType.RETRIED)
    elif state and (
        diff.changed("reported_state") or (state == failed and diff.changed("state_message"))
    ):
        yield about(EventType(state), row.state_message)


# --- all of them ---------------------------------------------------------------------------

_About = Callable[..., Happening]


def _about(kind: str, row: Any) -> _About:
    def happening(type: EventType, message: str = "", codes: tuple[str, ...] = ()) -> Happening:
        return Happening(kind, row.id, row.name, type, message[:MESSAGE_LIMIT], codes)

    return happening


_TELLERS: dict[type, Callable[[Diff, Around], Iterator[Happening]]] = {
    Model: _model,
    ModelVersion: _version,
    Worker: _worker,
    Instance: _instance,
    ModelFile: _file,
}
