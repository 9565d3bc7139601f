"""Which workers may take an instance at all. A filter answers None, or the reason against."""

from collections.abc import Callable

from gpustack.scheduler.snapshot import Node
from gpustack.schemas.models import ModelSpec
from gpustack.schemas.placements import Reason, ReasonCode
from gpustack.schemas.workers import WorkerState

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


#: Cheap ones first; the first refusal is the reason shown.
FILTERS: tuple[Filter, ...] = (ready, labels)
