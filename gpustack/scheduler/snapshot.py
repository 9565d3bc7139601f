"""The scheduler's entire view of the world: immutable, loaded once per decision."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce

from gpustack.schemas.placements import Claim
from gpustack.schemas.workers import Device, Worker

#: A device of a worker: its type and, among those of that type, its index.
DeviceKey = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Node:
    """A worker and what is still free on it.

    Attributes:
        free_ram_bytes: total less reserved less claimed; below 0 when claims came first.
        free_vram_bytes: the same of each device's memory, of unhealthy ones too.
        instances: instances of the model being placed that are on it already.
        unhealthy: devices with problems: what is there stays, nothing new comes.
    """

    worker: Worker
    free_ram_bytes: int
    free_vram_bytes: Mapping[DeviceKey, int]
    instances: int = 0
    unhealthy: tuple[Device, ...] = ()

    @property
    def usable_vram_bytes(self) -> Mapping[DeviceKey, int]:
        """What is free for something new: memory of each device without problems."""
        if not self.unhealthy:
            return self.free_vram_bytes
        unhealthy = {(device.type, device.index) for device in self.unhealthy}
        return {key: free for key, free in self.free_vram_bytes.items() if key not in unhealthy}

    def minus(self, claim: Claim) -> "Node":
        return replace(
            self,
            free_ram_bytes=self.free_ram_bytes - claim.ram_bytes,
            free_vram_bytes={
                key: free - (claim.of_device(*key) or 0)
                for key, free in self.free_vram_bytes.items()
            },
        )

    def plus(self, claim: Claim) -> "Node":
        """As if `claim`, which is on it, were not."""
        return replace(
            self,
            free_ram_bytes=self.free_ram_bytes + claim.ram_bytes,
            free_vram_bytes={
                key: free + (claim.of_device(*key) or 0)
                for key, free in self.free_vram_bytes.items()
            },
        )


@dataclass(frozen=True, slots=True)
class Snapshot:
    nodes: tuple[Node, ...]

    @classmethod
    def of(cls, workers: Iterable[Worker], claims: Iterable[tuple[int, Claim]]) -> "Snapshot":
        """The world as it is.

        Args:
            claims: (worker id, claim) of every instance that is placed, also of those being
                stopped: their memory is in use until the worker says that it is not.
        """
        nodes = {worker.id: _empty(worker) for worker in workers}
        for worker_id, claim in claims:
            if worker_id in nodes:
                nodes[worker_id] = nodes[worker_id].minus(claim)
        return cls(tuple(nodes[worker_id] for worker_id in sorted(nodes)))

    def with_claim(self, worker_id: int, claim: Claim) -> "Snapshot":
        """The world as it will be once this placement is made."""
        return Snapshot(
            tuple(node.minus(claim) if node.worker.id == worker_id else node for node in self.nodes)
        )

    def without_claims(self, claims: Iterable[tuple[int, Claim]]) -> "Snapshot":
        """The world as it would be if these, which are there, were not."""
        freed: dict[int, list[Claim]] = {}
        for worker_id, claim in claims:
            freed.setdefault(worker_id, []).append(claim)
        return Snapshot(
            tuple(reduce(Node.plus, freed.get(node.worker.id, []), node) for node in self.nodes)
        )

    def with_instances(self, counts: Mapping[int, int]) -> "Snapshot":
        """For the placement of one model: worker id -> its instances there already."""
        return Snapshot(
            tuple(replace(node, instances=counts.get(node.worker.id, 0)) for node in self.nodes)
        )


def _empty(worker: Worker) -> Node:
    if worker.status is None:
        return Node(worker, 0, {})
    return Node(
        worker,
        worker.status.memory_total_bytes - worker.system_reserved_ram_bytes,
        {
            (device.type, device.index): device.memory_total_bytes
            - worker.system_reserved_vram_bytes
            for device in worker.status.gpu_devices
        },
        unhealthy=tuple(device for device in worker.status.gpu_devices if device.problems),
    )
