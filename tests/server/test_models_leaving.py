"""The plan of a drain: workers are drained and opened again in the middle of anything."""

from dataclasses import replace
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from gpustack.server.controllers.rolling import (
    Add,
    Copy,
    Facts,
    Phase,
    Plan,
    Remove,
    Room,
    needs_room,
    plan_roll,
)
from tests.server import test_models_rolling as rolling
from tests.server.test_models_rolling import NEW, OLD, copy, planned


class World(rolling.World):
    """Workers, some of which are drained: nothing new comes there."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.drained: set[int] = set()
        self.most = self.replicas
        self.may_lack = 0  # of those that should answer; a roll without room takes one

    def drain(self, *workers: int) -> None:
        """These are drained from now on, and no others."""
        self.drained = set(workers)
        self.copies = [
            replace(one, leaving=f"w{one.worker}" if one.worker in workers else "")
            for one in self.copies
        ]

    def fit(self, version: int, freed: dict[int, int] | None = None) -> int | None:
        free = {w: room + (freed or {}).get(w, 0) for w, room in self.free.items()}
        open_ = ((w, room) for w, room in free.items() if w not in self.drained)
        return next((w for w, room in open_ if room >= self.size[version]), None)

    def plan(self) -> Plan:
        room = None
        if needs_room(self.copies):
            placed = self.of(Phase.READY, Phase.STARTING, Phase.FAILED)
            old = [one for one in placed if not one.wanted and not one.leaving]
            freed = {one.id: {one.worker or 0: self.size[one.version]} for one in old}
            instead = frozenset(id for id, gain in freed.items() if self.fit(NEW, gain) is not None)
            room = Room(self.fit(NEW), instead, "full")
        return plan_roll(Facts(self.replicas, NEW, tuple(self.copies), room))

    @property
    def ready(self) -> int:
        return len(self.of(Phase.READY, Phase.AWAY))

    def check(self) -> None:
        assert len(self.copies) <= self.most + 1
        assert self.ready >= self.replicas - self.may_lack
        assert all(room >= 0 for room in self.free.values())


def running(replicas: int, free: dict[int, int], version: int = NEW) -> World:
    world = World(replicas, dict(free), {OLD: 1, NEW: 1})
    for _ in range(replicas):
        world.add(version)
        while world.place() or world.answer():
            pass
    assert world.ready == replicas
    world.may_lack = int(version == OLD)
    return world


def on(world: World, *workers: int) -> list[Copy]:
    return [one for one in world.copies if one.worker in workers]


@st.composite
def worlds(draw: st.DrawFn, version: int = NEW) -> World:
    free = dict(enumerate(draw(st.lists(st.integers(0, 4), min_size=1, max_size=4)), start=1))
    most = sum(free.values())
    assume(most)
    return running(draw(st.integers(1, min(most, 5))), free, version)


WORKERS = st.sets(st.integers(1, 4))
ORDERS = st.lists(st.integers(0, 3), max_size=60)


@given(worlds(), ORDERS, WORKERS)
def test_a_drain_never_stops_one_that_serves_before_another_does_and_moves_what_fits(
    world: World, order: list[int], drained: set[int]
) -> None:
    world.drain(*drained)
    world.settle(order)  # checks each step: as many as should be answer at any time
    assert world.ready == world.replicas == len(world.copies)
    if on(world, *drained):
        assert world.fit(NEW) is None
        plan = world.plan()
        assert plan.look_again
        assert "stays on w" in plan.why
        assert "no room elsewhere: full" in plan.why
    else:
        assert world.plan() == Plan()


@given(worlds(version=OLD), ORDERS, WORKERS)
def test_a_drain_and_a_roll_go_together(world: World, order: list[int], drained: set[int]) -> None:
    world.drain(*drained)
    world.settle(order)
    assert world.ready == world.replicas
    if stuck := [one for one in world.copies if not one.stays]:
        assert world.plan().why
        assert world.fit(NEW) is None, stuck


@given(worlds(), ORDERS, st.lists(WORKERS, min_size=1, max_size=4), st.integers(0, 30))
def test_a_drain_that_ends_in_the_middle_leaves_as_many_as_there_should_be(
    world: World, order: list[int], drains: list[set[int]], when: int
) -> None:
    happenings = (world.act, world.place, world.answer, world.go)
    for drained in drains:
        world.drain(*drained)
        for turn in order[:when]:
            happenings[turn]()
            world.check()
    serving = {one.id for one in world.of(Phase.READY)}
    world.drain()
    world.settle()
    assert len(world.copies) == world.ready == world.replicas
    # Those that serve are kept; more would only be started for nothing.
    assert world.of(Phase.READY) == [one for one in world.copies if one.id in serving]


@given(worlds(), ORDERS, WORKERS, st.integers(0, 5))
def test_a_model_that_shrinks_gives_up_first_what_is_to_leave(
    world: World, order: list[int], drained: set[int], replicas: int
) -> None:
    world.drain(*drained)
    staying = world.replicas - len(on(world, *drained))
    world.replicas = min(replicas, world.replicas)
    world.settle(order)
    assert world.ready == world.replicas
    if world.replicas <= staying:
        assert not on(world, *drained)


@given(worlds(), ORDERS, WORKERS, st.integers(1, 4), st.integers(0, 20))
def test_a_worker_that_falls_silent_in_the_middle_stops_nothing_that_serves(
    world: World, order: list[int], drained: set[int], silent: int, when: int
) -> None:
    world.drain(*drained)
    happenings = (world.act, world.place, world.answer, world.go)
    for turn in order[:when]:
        happenings[turn]()
    for one in world.of(Phase.READY):
        if one.worker == silent:
            world.change(one, phase=Phase.AWAY)
    world.settle(order)  # what is out of reach may serve, and counts as if it did
    away = world.of(Phase.AWAY)
    assert world.ready >= world.replicas
    if [one for one in away if one.stays]:
        assert world.plan() == Plan() or "silent" in world.plan().why
    elif on(world, *drained):
        assert "no room elsewhere" in world.plan().why
    else:
        assert not away


def test_one_goes_once_its_successor_answers_elsewhere() -> None:
    world = running(1, {1: 1, 2: 1})
    world.drain(1)
    assert world.plan().steps == (Add(NEW),)
    world.act()
    assert world.plan() == Plan()
    world.place()
    assert world.plan() == Plan()
    world.answer()
    assert world.plan().steps == (Remove(1),)


def leaving(id: int, phase: Phase = Phase.READY, **more: Any) -> Copy:
    return copy(id, NEW, phase, **{"worker": 9, "leaving": "w9"} | more)


def test_one_that_does_not_answer_is_moved_new_before_old_as_well() -> None:
    for phase in (Phase.FAILED, Phase.STARTING, Phase.AWAY):
        assert planned(leaving(1, phase), copy(2, NEW)).steps == (Add(NEW),)
        done = planned(leaving(1, phase), copy(2, NEW), copy(3, NEW))
        assert done.steps == (Remove(1),)


def test_room_that_would_be_there_without_it_is_none_for_its_successor() -> None:
    plan = planned(leaving(1), copy(2, NEW), room=Room(None, frozenset({1}), "full"))
    assert (plan.steps, plan.look_again) == ((), True)
    assert plan.why == "m-1 stays on w9, for there is no room elsewhere: full"


def test_a_successor_that_fails_stops_the_drain_and_the_old_one_serves() -> None:
    plan = planned(leaving(1), copy(2, NEW), copy(3, NEW, Phase.FAILED, said="boom"))
    assert (plan.steps, plan.why) == ((), "m-3 failed: boom")


def test_it_waits_for_a_roll_of_another_model_only_where_its_successor_goes() -> None:
    assert planned(leaving(1), replicas=1, busy={9: "other"}, room=Room(3)).steps == (Add(NEW),)
    plan = planned(leaving(1), replicas=1, busy={3: "other"}, room=Room(3))
    assert (plan.steps, plan.look_again) == ((), True)
    assert "the roll of other" in plan.why


def test_on_a_worker_that_is_opened_again_the_running_ones_stay() -> None:
    back = copy(1, NEW)
    for phase in (Phase.WAITING, Phase.STARTING, Phase.FAILED):
        assert planned(back, copy(2, NEW, phase), replicas=1).steps == (Remove(2),)
