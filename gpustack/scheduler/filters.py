"""Which workers may take an instance at all. A filter answers None, or the reason against."""

from collections.abc import Callable

from gpustack.scheduler.snapshot import Node
from gpustack.schemas.models import ModelSpec
from gpustack.schemas.placements import Reason, ReasonCode
from gpustack.schemas.workers import Scheduling, WorkerState

Filter = Callable[[Node, ModelSpec], Reason | None]


def ready(node: Node, spec: ModelSpec) -> Reason | None:
    worker = node.worker
    if worker.state is WorkerState.READY:
        return None
    why = worker.state_message or worker.state.value
    return Reason(
        code=ReasonCode.NOT_READY, worker=worker.name, message=f"{worker.name} is not ready: {why}"
    )


def labels(node: Node, spec: ModelSpec) -> Reason | None:
    worker = node.worker
    for key, wanted in sorted(spec.worker_selector.items()):
        if worker.labels.get(key) != wanted:
            has = f"has {key}={worker.labels[key]}" if key in worker.labels else f"has no {key}"
            return Reason(
                code=ReasonCode.LABELS,
                worker=worker.name,
                message=f"{worker.name} {has}, the model wants {key}={wanted}",
            )
    return None


def open_to_new(node: Node, spec: ModelSpec) -> Reason | None:
    worker = node.worker
    if worker.scheduling is Scheduling.ACTIVE:
        return None
    how = "is being drained" if worker.scheduling is Scheduling.DRAINING else "is cordoned"
    why = f": {worker.scheduling_reason}" if worker.scheduling_reason else ""
    return Reason(code=ReasonCode.CORDONED, worker=worker.name, message=f"{worker.name} {how}{why}")


#: The first refusal is the reason shown.
FILTERS: tuple[Filter, ...] = (ready, labels, open_to_new)
