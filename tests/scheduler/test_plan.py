"""Placement: the same facts give the same answer, and no claim exceeds what is left."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from gpustack.backends.base import Demand
from gpustack.lib.units import GIB
from gpustack.scheduler.plan import place
from gpustack.scheduler.snapshot import Snapshot
from gpustack.scheduler.standing import standing
from gpustack.schemas.models import ModelSpec, PlacementStrategy, Source
from gpustack.schemas.placements import Claim, Placement, Reason, ReasonCode
from gpustack.schemas.workers import (
    Device,
    DeviceProblem,
    ProblemCode,
    Scheduling,
    Worker,
    WorkerState,
    WorkerStatus,
)

START = "2026-01-01T00:00:00Z"


def worker(
    worker_id: int,
    ram_gib: int,
    *vram_gib: int,
    ready: bool = True,
    broken: Sequence[int] = (),
    scheduling: Scheduling = Scheduling.ACTIVE,
    why: str = "",
    **labels: str,
) -> Worker:
    """A worker. The devices at the indexes `broken` have problems."""
    status = WorkerStatus(
        os="linux",
        arch="x86_64",
        cpu_count=2,
        memory_total_bytes=ram_gib * GIB,
        gpu_devices=[
            Device(
                index=index,
                vendor="nvidia",
                memory_total_bytes=size * GIB,
                problems=[xid(79)] if index in broken else [],
            )
            for index, size in enumerate(vram_gib)
        ],
    )
    return Worker.model_validate(
        {
            "id": worker_id,
            "name": f"w{worker_id}",
            "hostname": "h",
            "ip": "127.0.0.1",
            "port": 1,
            "labels": labels,
            "system_reserved_ram_bytes": 2 * GIB,
            "system_reserved_vram_bytes": 1 * GIB,
            "scheduling": scheduling,
            "scheduling_reason": why,
            "state": WorkerState.READY if ready else WorkerState.UNREACHABLE,
            "status": status,
            "created_at": START,
            "updated_at": START,
        }
    )


def xid(number: int) -> DeviceProblem:
    return DeviceProblem(code=ProblemCode.XID, message=f"Xid {number} at 12:00")


def spec(**more: object) -> ModelSpec:
    return ModelSpec.model_validate(
        {"name": "m", "source": Source.LOCAL_PATH, "local_path": "/m.gguf"} | more
    )


def cpu(ram_gib: float) -> Demand:
    return Demand(devices=0, vram_bytes=0, ram_bytes=int(ram_gib * GIB))


def gpu(devices: int, vram_gib: float) -> Demand:
    return Demand(devices=devices, vram_bytes=int(vram_gib * GIB), ram_bytes=0)


def test_reserved_memory_is_never_given_away() -> None:
    world = Snapshot.of([worker(1, 8)], [])
    assert isinstance(place(spec(), [cpu(6)], world), Placement)
    refused = place(spec(), [cpu(6.1)], world)
    assert not isinstance(refused, Placement)
    assert refused[0].message == "w1: 6.0 GiB of memory free, 6.1 GiB needed"


def test_every_worker_that_was_refused_says_why() -> None:
    world = Snapshot.of([worker(1, 4), worker(2, 64, ready=False), worker(3, 64, zone="b")], [])
    refused = place(spec(worker_selector={"zone": "a"}), [cpu(8)], world)
    assert not isinstance(refused, Placement)
    assert [(reason.worker, reason.code) for reason in refused] == [
        ("w1", ReasonCode.LABELS),
        ("w2", ReasonCode.NOT_READY),
        ("w3", ReasonCode.LABELS),
    ]


def test_an_empty_cluster_says_how_to_add_a_worker() -> None:
    refused = place(spec(), [cpu(1)], Snapshot.of([], []))
    assert not isinstance(refused, Placement)
    assert (refused[0].code, "--server-url" in refused[0].message) == (ReasonCode.NO_WORKERS, True)


def test_the_cheapest_demand_that_fits_anywhere_wins() -> None:
    world = Snapshot.of([worker(1, 64, 12, 12)], [])
    got = place(spec(), [gpu(1, 20), gpu(2, 10), cpu(1)], world)
    assert isinstance(got, Placement)
    assert got.claim.vram_bytes == {0: 10 * GIB, 1: 10 * GIB}


def test_the_fullest_device_with_room_is_taken_so_that_the_emptiest_stays_whole() -> None:
    world = Snapshot.of([worker(1, 64, 80, 24)], [])
    got = place(spec(), [gpu(1, 10)], world)
    assert isinstance(got, Placement)
    assert list(got.claim.vram_bytes) == [1]


def test_spread_puts_copies_apart_and_binpack_together() -> None:
    world = Snapshot.of([worker(1, 64), worker(2, 32)], [(2, Claim(ram_bytes=GIB))])
    apart = place(spec(), [cpu(1)], world.with_instances({1: 1}))
    together = place(spec(placement_strategy=PlacementStrategy.BINPACK), [cpu(1)], world)
    assert isinstance(apart, Placement)
    assert isinstance(together, Placement)
    assert (apart.worker_id, together.worker_id) == (2, 2)
    alone = place(spec(), [cpu(1)], world)
    assert isinstance(alone, Placement)
    assert alone.worker_id == 1


def test_a_stopping_instance_keeps_its_memory_until_it_is_gone() -> None:
    world = Snapshot.of([worker(1, 8)], [(1, Claim(ram_bytes=4 * GIB))])
    assert not isinstance(place(spec(), [cpu(3)], world), Placement)


def test_an_unhealthy_device_takes_nothing_new_and_the_reason_has_the_evidence() -> None:
    world = Snapshot.of([worker(1, 64, 24, 24, 24, 24, broken=(1, 3))], [])
    got = place(spec(), [gpu(2, 20)], world)
    assert isinstance(got, Placement)
    assert list(got.claim.vram_bytes) == [0, 2]
    (reason,) = refused(place(spec(), [gpu(3, 20)], world))
    assert (reason.code, reason.message) == (
        ReasonCode.UNHEALTHY,
        "w1: 2 of 4 GPUs are unhealthy: GPU 1: Xid 79 at 12:00; GPU 3: Xid 79 at 12:00",
    )
    assert (reason.needed_bytes, reason.available_bytes) == (20 * GIB, 23 * GIB)


def test_of_many_unhealthy_devices_a_reason_names_three() -> None:
    world = Snapshot.of([worker(1, 64, *[24] * 8, broken=range(8))], [])
    (reason,) = refused(place(spec(), [gpu(1, 20)], world))
    assert "8 of 8 GPUs are unhealthy: GPU 0: " in reason.message
    assert reason.message.endswith("GPU 2: Xid 79 at 12:00; and 5 more")


def test_what_would_not_fit_on_healthy_devices_either_is_no_matter_of_health() -> None:
    world = Snapshot.of([worker(1, 64, 24, broken=(0,))], [])
    (reason,) = refused(place(spec(), [gpu(1, 30)], world))
    assert (reason.code, "23.0 GiB free" in reason.message) == (ReasonCode.VRAM, True)


def test_a_way_that_a_broken_device_bars_is_the_reason_whatever_bars_the_next() -> None:
    world = Snapshot.of([worker(1, 8, 24, broken=(0,))], [])
    (reason,) = refused(place(spec(), [gpu(1, 20), cpu(64)], world))
    assert reason.code is ReasonCode.UNHEALTHY


def test_what_is_on_an_unhealthy_device_keeps_its_claim_and_stands_worst() -> None:
    claim = Claim(vram_bytes={0: 10 * GIB})
    (node,) = Snapshot.of([worker(1, 64, 24, 24, broken=(0,))], [(1, claim)]).nodes
    assert node.free_vram_bytes["", 0] == 13 * GIB
    assert standing(spec(), node, claim) < standing(spec(), node, Claim(vram_bytes={1: 0}))


def test_a_worker_that_is_cordoned_or_drained_takes_nothing_and_says_why() -> None:
    for scheduling, why, said in (
        (Scheduling.CORDONED, "disk swap", "w1 is cordoned: disk swap"),
        (Scheduling.CORDONED, "", "w1 is cordoned"),
        (Scheduling.DRAINING, "new driver", "w1 is being drained: new driver"),
    ):
        world = Snapshot.of([worker(1, 64, scheduling=scheduling, why=why)], [])
        (reason,) = refused(place(spec(), [cpu(1)], world))
        assert (reason.code, reason.message) == (ReasonCode.CORDONED, said)


def two_vendors(*broken: str) -> Worker:
    """A worker with cards of two vendors, whose indexes both begin at 0."""
    one = worker(1, 64, 24, 48)
    assert one.status is not None
    cards = [
        device.model_copy(update={"type": kind, "problems": [xid(79)] if kind in broken else []})
        for kind in ("cuda", "rocm")
        for device in one.status.gpu_devices
    ]
    return one.model_copy(update={"status": one.status.model_copy(update={"gpu_devices": cards})})


def test_devices_of_two_vendors_with_one_index_are_two_devices() -> None:
    world = Snapshot.of([two_vendors()], [])
    taken = []
    for _ in range(2):
        got = place(spec(), [gpu(1, 40)], world)
        assert isinstance(got, Placement)
        taken.append((got.claim.device_type, list(got.claim.vram_bytes)))
        world = world.with_claim(1, got.claim)
    assert taken == [("cuda", [1]), ("rocm", [1])]
    assert refused(place(spec(), [gpu(1, 40)], world))


def test_an_instance_never_gets_devices_of_two_vendors() -> None:
    world = Snapshot.of([two_vendors()], [])
    got = place(spec(), [gpu(2, 20)], world)
    assert isinstance(got, Placement)
    assert (got.claim.device_type, list(got.claim.vram_bytes)) == ("cuda", [0, 1])
    assert refused(place(spec(), [gpu(3, 20)], world))


def test_a_broken_device_bars_none_of_another_vendor() -> None:
    world = Snapshot.of([two_vendors("cuda")], [])
    got = place(spec(), [gpu(2, 20)], world)
    assert isinstance(got, Placement)
    assert got.claim.device_type == "rocm"
    (node,) = world.with_claim(1, got.claim).nodes
    assert standing(spec(), node, got.claim)[0] is True
    assert standing(spec(), node, Claim(device_type="cuda", vram_bytes={0: 1}))[0] is False


def test_a_claim_that_says_no_type_is_of_all_devices_with_its_index() -> None:
    world = Snapshot.of([two_vendors()], [(1, Claim(vram_bytes={1: 20 * GIB}))])
    assert refused(place(spec(), [gpu(1, 30)], world))


def refused(answer: Placement | tuple[Reason, ...]) -> tuple[Reason, ...]:
    assert not isinstance(answer, Placement)
    return answer


workers = st.lists(
    st.tuples(
        st.integers(1, 64),
        st.lists(st.integers(1, 96), max_size=4),
        st.sets(st.integers(0, 3)),
        st.sampled_from([*[Scheduling.ACTIVE] * 3, Scheduling.CORDONED, Scheduling.DRAINING]),
    ),
    min_size=1,
    max_size=4,
)
demands = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 100), st.integers(0, 70)), min_size=1, max_size=4
)


@given(workers, demands, st.integers(1, 6), st.sampled_from(PlacementStrategy))
def test_placements_never_exceed_what_a_worker_has_left_nor_go_where_nothing_new_may(
    sizes: list[tuple[int, list[int], set[int], Scheduling]],
    wanted: list[tuple[int, int, int]],
    copies: int,
    strategy: PlacementStrategy,
) -> None:
    found = [
        worker(number, ram, *vram, broken=sorted(broken), scheduling=scheduling)
        for number, (ram, vram, broken, scheduling) in enumerate(sizes, 1)
    ]
    ways = [
        Demand(devices=devices, vram_bytes=vram * GIB, ram_bytes=ram * GIB)
        for devices, vram, ram in wanted
    ]
    world = Snapshot.of(found, [])
    empty = {node.worker.id: node for node in world.nodes}
    for _ in range(copies):
        got = place(spec(placement_strategy=strategy), ways, world)
        assert got == place(spec(placement_strategy=strategy), ways, world)
        if not isinstance(got, Placement):
            assert {reason.worker for reason in got} == {one.name for one in found}
            break
        _, _, broken, scheduling = sizes[got.worker_id - 1]
        assert scheduling is Scheduling.ACTIVE
        assert not broken & got.claim.vram_bytes.keys()
        world = world.with_claim(got.worker_id, got.claim)
    for node in world.nodes:
        before = empty[node.worker.id]
        assert node.free_ram_bytes >= min(before.free_ram_bytes, 0)
        for key, free in node.free_vram_bytes.items():
            assert free >= min(before.free_vram_bytes[key], 0)
