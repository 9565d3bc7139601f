"""The plan of a roll, in a small world of workers with so many places."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpustack.server.controllers.rolling import (
    Add,
    Copy,
    Facts,
    GiveUp,
    Phase,
    Plan,
    Remove,
    Room,
    needs_room,
    plan_roll,
)

OLD, NEW = 1, 2


@dataclass
class World:
    """Workers, and the instances of one model on them; a scheduler that takes the first fit.

    Attributes:
        free: worker -> what is free on it.
        size: version -> what one instance of it takes.
        fails: how many instances of the new version come to answer; the next one fails.
    """

    replicas: int
    free: dict[int, int]
    size: dict[int, int]
    fails: int = 1000
    copies: list[Copy] = field(default_factory=list)
    made: int = 0

    def add(self, version: int, **more: Any) -> None:
        self.made += 1
        wanted = version == NEW
        self.copies.append(Copy(self.made, version, wanted, Phase.WAITING, **more))

    def change(self, copy: Copy, **now: Any) -> None:
        self.copies[self.copies.index(copy)] = replace(copy, **now)

    def of(self, *phases: Phase) -> list[Copy]:
        return [copy for copy in self.copies if copy.phase in phases]

    @property
    def ready(self) -> int:
        return len(self.of(Phase.READY))

    # --- what happens by itself ----------------------------------------------------------

    def place(self) -> bool:
        waiting = sorted(self.of(Phase.WAITING), key=lambda c: (c.fallback is None, c.id))
        for copy in waiting:
            worker = self.fit(copy.version)
            if worker is not None:
                self.free[worker] -= self.size[copy.version]
                self.change(copy, phase=Phase.STARTING, worker=worker)
                return True
        return False

    def answer(self) -> bool:
        for copy in self.of(Phase.STARTING):
            broken = copy.wanted and self.fails == 0
            self.fails -= copy.wanted and not broken
            self.change(copy, phase=Phase.FAILED if broken else Phase.READY)
            return True
        return False

    def go(self) -> bool:
        for copy in self.of(Phase.STOPPING):
            self.copies.remove(copy)
            self.free[copy.worker or 0] += self.size[copy.version]
            return True
        return False

    def fit(self, version: int, freed: dict[int, int] | None = None) -> int | None:
        free = {w: room + (freed or {}).get(w, 0) for w, room in self.free.items()}
        return next((w for w, room in free.items() if room >= self.size[version]), None)

    # --- what the controller does --------------------------------------------------------

    def plan(self) -> Plan:
        room = None
        if needs_room(self.copies):
            placed = self.of(Phase.READY, Phase.STARTING, Phase.FAILED)
            freed = {c.id: {c.worker or 0: self.size[c.version]} for c in placed if not c.wanted}
            instead = frozenset(id for id, gain in freed.items() if self.fit(NEW, gain) is not None)
            room = Room(self.fit(NEW), instead, "full")
        return plan_roll(Facts(self.replicas, NEW, tuple(self.copies), room))

    def act(self) -> bool:
        plan = self.plan()
        for step in plan.steps:
            match step:
                case Add(version, fallback):
                    self.add(version, fallback=fallback)
                case Remove(id) | GiveUp(id):
                    (copy,) = (c for c in self.copies if c.id == id)
                    if isinstance(step, GiveUp):
                        self.change(copy, fallback=None)
                    elif copy.phase is Phase.WAITING:
                        self.copies.remove(copy)
                    else:
                        self.change(copy, phase=Phase.STOPPING)
        return bool(plan.steps)

    def settle(self, order: list[int] | None = None) -> None:
        """Let things happen until nothing does, in this order as long as it lasts."""
        happenings = (self.act, self.place, self.answer, self.go)
        for _ in range(2000):
            turn = order.pop() if order else 0
            turned = happenings[turn % 4 :] + happenings[: turn % 4]
            if not any(happen() for happen in turned):
                return
            self.check()
        raise AssertionError(f"it never ends: {self.copies}")

    def check(self) -> None:
        assert len(self.copies) <= self.replicas + 1
        assert self.ready >= self.replicas - 1
        assert all(room >= 0 for room in self.free.values())


def running(replicas: int, free: dict[int, int], size: dict[int, int], **more: Any) -> World:
    """A world in which `replicas` instances of the old version run."""
    world = World(replicas, dict(free), {OLD: 1, NEW: 1} | size, **more)
    for _ in range(replicas):
        world.add(OLD)
        while world.place() or world.answer():
            pass
    assert world.ready == replicas
    return world


def versions(world: World) -> list[int]:
    return sorted(copy.version for copy in world.of(Phase.READY))


@st.composite
def worlds(draw: st.DrawFn) -> World:
    replicas = draw(st.integers(1, 5))
    old, new = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    spare = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    free = dict(enumerate(spare, start=1))
    for number in range(replicas):
        free[1 + number % len(free)] += old
    return running(replicas, free, {OLD: old, NEW: new})


ORDERS = st.lists(st.integers(0, 3), max_size=60)


@given(worlds(), ORDERS)
def test_a_roll_keeps_the_service_up_and_ends_with_the_new_version_where_it_fits(
    world: World, order: list[int]
) -> None:
    world.settle(order)
    assert world.ready == world.replicas
    if OLD in versions(world):
        plan = world.plan()
        assert "no room" in plan.why
        assert plan.look_again
        assert world.fit(NEW) is None
    else:
        assert world.plan() == Plan()
        assert versions(world) == [NEW] * world.replicas


@given(worlds(), ORDERS, st.integers(0, 4))
def test_the_first_failure_stops_a_roll_and_what_serves_goes_on_serving(
    world: World, order: list[int], good: int
) -> None:
    world.fails = good
    world.settle(order)
    failed = world.of(Phase.FAILED)
    if failed:
        assert len(failed) == 1
        assert "failed" in world.plan().why
        assert versions(world).count(NEW) == good
        assert world.ready >= world.replicas - 1
    else:
        assert world.ready == world.replicas


@given(worlds(), ORDERS, st.integers(0, 20), st.integers(1, 3))
def test_memory_that_others_take_meanwhile_brings_the_old_version_back_at_most(
    world: World, order: list[int], when: int, worker: int
) -> None:
    """The new version may lose its place; the places that are left are used, and nothing flaps."""
    happenings = (world.act, world.place, world.answer, world.go)
    for turn in order[:when]:
        happenings[turn]()
    if worker in world.free:
        world.free[worker] = 0  # somebody was faster
    for _ in range(500):
        if not any([world.act(), world.place(), world.answer(), world.go()]):
            break
        assert len(world.copies) <= world.replicas + 1
    else:
        raise AssertionError(f"it never ends: {world.copies}")
    for copy in world.of(Phase.WAITING):
        assert world.fit(copy.version) is None


def test_one_instance_more_comes_first_where_there_is_room() -> None:
    world = running(2, {1: 3}, {})
    assert world.plan().steps == (Add(NEW),)
    world.act()
    world.place()
    assert world.plan() == Plan()  # it is starting
    world.answer()
    assert world.plan().steps == (Remove(2),)  # of equals the youngest


def test_without_room_an_old_one_stops_first_and_the_new_one_takes_its_place() -> None:
    world = running(2, {1: 2}, {})
    assert world.plan().steps == (Remove(2), Add(NEW, fallback=OLD))
    world.settle()
    assert versions(world) == [NEW, NEW]


def test_one_that_fits_in_no_place_of_an_old_one_stops_nothing() -> None:
    world = running(2, {1: 2}, {NEW: 2})
    plan = world.plan()
    assert plan.steps == ()
    assert plan.why.endswith("in place of an old one: full")


def test_the_old_version_is_placed_again_when_the_new_one_does_not_fit_after_all() -> None:
    world = running(1, {1: 2}, {OLD: 2, NEW: 2})
    world.act()
    world.go()
    world.free[1] = 1  # somebody took a part of it
    world.size[OLD] = 1
    assert world.plan().steps == (GiveUp(2), Add(OLD))
    world.settle()
    assert [(c.version, c.phase) for c in world.copies] == [
        (NEW, Phase.WAITING),
        (OLD, Phase.READY),
    ]
    assert world.plan().steps == ()  # it had its chance
    world.free[1] = 2
    world.settle()
    assert versions(world) == [NEW]


def copy(id: int, version: int = OLD, phase: Phase = Phase.READY, **more: Any) -> Copy:
    facts: dict[str, Any] = {"worker": 1 if phase is not Phase.WAITING else None, "name": f"m-{id}"}
    return Copy(id, version, version == NEW, phase, **facts | more)


def planned(*copies: Copy, replicas: int = 2, room: Room | None = None, **more: Any) -> Plan:
    return plan_roll(Facts(replicas, NEW, copies, room or Room(1), **more))


def test_what_does_not_answer_is_removed_first_then_what_is_placed_worst() -> None:
    world = [
        copy(1, NEW, worth=(3.0,)),
        copy(2, NEW, Phase.STARTING),
        copy(3, NEW, worth=(1.0,)),
        copy(4, NEW, Phase.WAITING),
        copy(5, NEW, Phase.FAILED),
        copy(6, NEW, Phase.AWAY),
    ]
    order = [4, 5, 2, 6, 3, 1]
    for kept in range(len(world)):
        removed = {step.id for step in planned(*world, replicas=kept).steps}  # type: ignore[union-attr]
        assert removed == set(order[: len(world) - kept])


def test_of_two_versions_the_old_one_goes_first() -> None:
    assert planned(copy(1, NEW), copy(2, OLD), replicas=1).steps == (Remove(2),)


def test_an_old_one_that_answers_nobody_is_replaced_before_those_that_do() -> None:
    for phase in (Phase.FAILED, Phase.STARTING):
        plan = planned(copy(1), copy(2, phase=phase))
        assert plan.steps == (Remove(2), Add(NEW, fallback=OLD))
    waiting = planned(copy(1), copy(2, phase=Phase.WAITING, fallback=7))
    assert waiting.steps == (Remove(2), Add(NEW, fallback=7))  # it was to take another's place


def test_the_place_of_one_is_not_taken_while_another_does_not_answer() -> None:
    full = Room(None, frozenset({1, 2}))
    plan = planned(copy(1), copy(2, phase=Phase.AWAY), room=full)
    assert (plan.steps, plan.look_again) == ((), True)
    assert "m-2 does not answer" in plan.why


def test_while_the_new_version_fails_gaps_are_filled_with_the_old_one() -> None:
    failed = copy(3, NEW, Phase.FAILED, said="no such tensor\nlots\nmore")
    assert planned(copy(1), failed, replicas=3).steps == (Add(OLD),)
    assert planned(failed, replicas=2).steps == (Add(NEW),)  # there is no other
    stopped = planned(copy(1), copy(2), failed)
    assert (stopped.steps, stopped.why) == ((), "m-3 failed: no such tensor")


def test_a_failed_successor_is_kept_for_people_to_look_at_when_the_model_shrinks() -> None:
    failed = copy(3, NEW, Phase.FAILED)
    assert planned(copy(1), copy(2), failed, replicas=1).steps == (Remove(2),)
    everything = planned(copy(1), copy(2), failed, replicas=0)
    assert set(everything.steps) == {Remove(1), Remove(2), Remove(3)}


def test_one_model_at_a_time_is_rolled_on_a_worker() -> None:
    here, there = copy(1), copy(2, worker=2)
    assert planned(here, there, busy={1: "other"}, room=Room(3)).steps == (Add(NEW),)
    full = Room(None, frozenset({1, 2}))
    plan = planned(here, there, busy={2: "other"}, room=full)
    assert plan.steps == (Remove(1), Add(NEW, fallback=OLD))
    for busy, room in (({1: "other", 2: "other"}, full), ({3: "other"}, Room(3))):
        plan = planned(here, there, busy=busy, room=room)
        assert (plan.steps, plan.look_again) == ((), True)
        assert "the roll of other" in plan.why


PHASES = st.sampled_from(list(Phase))


@given(
    st.lists(st.tuples(st.sampled_from([OLD, NEW]), PHASES, st.booleans()), max_size=8),
    st.integers(0, 4),
    st.sets(st.integers(1, 8)),
    st.sampled_from([None, 1]),
)
def test_whatever_the_world_looks_like_no_plan_takes_too_much_or_adds_too_many(
    seen: list[tuple[int, Phase, bool]], replicas: int, instead: set[int], worker: int | None
) -> None:
    copies = [
        copy(id, version, phase, fallback=OLD if held and phase is Phase.WAITING else None)
        for id, (version, phase, held) in enumerate(seen, start=1)
    ]
    plan = planned(*copies, replicas=replicas, room=Room(worker, frozenset(instead)))
    removed = {step.id for step in plan.steps if isinstance(step, Remove)}
    live = [c for c in copies if c.phase is not Phase.STOPPING]
    assert removed <= {c.id for c in live}
    ready = sum(c.phase is Phase.READY for c in live)
    left = sum(c.phase is Phase.READY and c.id not in removed for c in live)
    assert left >= min(ready, replicas) - 1
    adds = sum(isinstance(step, Add) for step in plan.steps)
    assert len(live) - len(removed) + adds <= max(len(live), replicas + 1)
    broken = any(c.wanted and c.phase is Phase.FAILED for c in live)
    serving = any(not c.wanted for c in live)
    if broken and serving and len(live) <= replicas + 1:
        assert left == ready
        assert all(step.version == OLD for step in plan.steps if isinstance(step, Add))


@pytest.mark.parametrize("phase", [Phase.WAITING, Phase.STARTING, Phase.AWAY])
def test_nothing_else_happens_while_a_new_one_is_on_its_way(phase: Phase) -> None:
    assert planned(copy(1), copy(2), copy(3, NEW, phase)).steps == ()


def test_of_a_model_that_shrinks_in_a_roll_those_that_answer_nobody_go_first() -> None:
    failed, starting = copy(2, NEW, Phase.FAILED), copy(3, NEW, Phase.STARTING)
    assert planned(copy(1), failed, starting, replicas=1).steps == (Remove(3),)


def test_a_lost_place_needs_no_old_version_when_there_are_enough_without() -> None:
    waiting = copy(3, NEW, Phase.WAITING, fallback=OLD)
    assert planned(copy(1), waiting, room=Room(None)).steps == (GiveUp(3), Add(OLD))
    assert planned(copy(1), copy(2), waiting, room=Room(None)).steps == (GiveUp(3),)


def test_room_on_a_worker_where_another_model_is_rolled_counts_for_nothing() -> None:
    plan = planned(copy(1, phase=Phase.FAILED), copy(2), room=Room(3), busy={3: "other"})
    assert plan.steps == ()
