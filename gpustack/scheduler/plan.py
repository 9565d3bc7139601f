"""Choose where one instance goes: feasible, fit, score.

Pure: a snapshot goes in, a placement or the reasons against one come out. The same arguments
always give the same answer, a claim never exceeds what a worker has left, and none is on a device
that has problems.
"""

from collections.abc import Iterable, Mapping, Sequence

from gpustack.backends.base import Demand
from gpustack.lib.units import gib
from gpustack.scheduler.filters import FILTERS, Filter
from gpustack.scheduler.snapshot import DeviceKey, Node, Snapshot
from gpustack.schemas.models import ModelSpec, PlacementStrategy
from gpustack.schemas.placements import Claim, Placement, Reason, ReasonCode

#: Unhealthy devices whose evidence a reason names.
DEVICES_SHOWN = 3


def place(
    spec: ModelSpec,
    demands: Iterable[Demand],
    snapshot: Snapshot,
    *,
    filters: Sequence[Filter] = FILTERS,
) -> Placement | tuple[Reason, ...]:
    """Where an instance of `spec` goes, or one reason per worker why it cannot go there.

    Args:
        demands: cheapest first; the first that fits anywhere wins.
    """
    if not snapshot.nodes:
        message = "the cluster has no workers: add one with `gpustack start --server-url`"
        return (Reason(code=ReasonCode.NO_WORKERS, message=message),)
    refused: dict[int, Reason] = {}
    feasible: list[Node] = []
    for node in snapshot.nodes:
        reason = next((why for check in filters if (why := check(node, spec))), None)
        if reason is None:
            feasible.append(node)
        else:
            refused[node.worker.id] = reason
    for demand in demands:
        options = [(node, claim) for node in feasible if (claim := fit(demand, node))]
        if options:
            node, claim = max(options, key=lambda o: (score(spec, *o), -o[0].worker.id))
            return Placement(worker_id=node.worker.id, claim=claim)
        # The last demand is the most modest; its reasons are the ones to read, unless a better
        # one would have been met but for a device that is broken.
        refused |= {
            node.worker.id: unhealthy(demand, node) or too_small(demand, node)
            for node in feasible
            if not _is(ReasonCode.UNHEALTHY, refused.get(node.worker.id))
        }
    return tuple(refused[node.worker.id] for node in snapshot.nodes if node.worker.id in refused)


def _is(code: ReasonCode, reason: Reason | None) -> bool:
    return reason is not None and reason.code is code


def fit(demand: Demand, node: Node) -> Claim | None:
    """What `demand` would claim of `node`; None if that is more than is free on healthy devices."""
    return _claim(demand, node, node.usable_vram_bytes)


def _claim(demand: Demand, node: Node, vram_bytes: Mapping[DeviceKey, int]) -> Claim | None:
    if demand.ram_bytes > max(node.free_ram_bytes, 0):
        return None
    device_type, indexes = "", list[int]()
    if demand.devices:
        # Of each type, the fullest devices that still have room, so that the emptiest stay whole.
        roomy: dict[str, list[tuple[int, int]]] = {}
        for (kind, index), free in vram_bytes.items():
            if free >= demand.vram_bytes:
                roomy.setdefault(kind, []).append((free, index))
        enough = [
            (sorted(found)[: demand.devices], kind)
            for kind, found in roomy.items()
            if len(found) >= demand.devices
        ]
        if not enough:
            return None
        fullest, device_type = min(enough)
        indexes = sorted(index for _, index in fullest)
    return Claim(
        ram_bytes=demand.ram_bytes,
        device_type=device_type,
        vram_bytes=dict.fromkeys(indexes, demand.vram_bytes),
        explanation=demand.explanation,
    )


def score(spec: ModelSpec, node: Node, claim: Claim) -> tuple[float, ...]:
    """How good a place is; larger is better."""
    left = node.minus(claim)
    free = left.free_ram_bytes + sum(left.usable_vram_bytes.values())
    if spec.placement_strategy is PlacementStrategy.BINPACK:
        return (-free,)
    return (-node.instances, free)  # spread: copies of one model apart first


def unhealthy(demand: Demand, node: Node) -> Reason | None:
    """Which devices of `node` keep it from meeting `demand`; None: it is too small anyway."""
    if _claim(demand, node, node.free_vram_bytes) is None:
        return None
    broken, worker = node.unhealthy, node.worker
    evidence = [
        f"GPU {device.index}: {', '.join(problem.message for problem in device.problems)}"
        for device in broken[:DEVICES_SHOWN]
    ]
    if more := len(broken) - len(evidence):
        evidence.append(f"and {more} more")
    count = len(worker.status.gpu_devices) if worker.status else 0
    verb = "is" if len(broken) == 1 else "are"
    what = f"{len(broken)} of {count} GPUs {verb} unhealthy"
    return Reason(
        code=ReasonCode.UNHEALTHY,
        worker=worker.name,
        message=f"{worker.name}: {what}: {'; '.join(evidence)}",
        needed_bytes=demand.vram_bytes,
        available_bytes=max(max(node.usable_vram_bytes.values(), default=0), 0),
    )


def too_small(demand: Demand, node: Node) -> Reason:
    name = node.worker.name
    if demand.ram_bytes > max(node.free_ram_bytes, 0):
        free = max(node.free_ram_bytes, 0)
        return Reason(
            code=ReasonCode.RAM,
            worker=name,
            message=f"{name}: {gib(free)} of memory free, {gib(demand.ram_bytes)} needed",
            needed_bytes=demand.ram_bytes,
            available_bytes=free,
        )
    best = max(node.free_vram_bytes.values(), default=0)
    needed = f"{gib(demand.vram_bytes)} needed on each of {demand.devices}"
    return Reason(
        code=ReasonCode.VRAM,
        worker=name,
        message=f"{name}: {gib(max(best, 0))} free on the best GPU, {needed}",
        needed_bytes=demand.vram_bytes,
        available_bytes=max(best, 0),
    )
