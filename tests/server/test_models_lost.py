"""Instances whose workers fall silent and return: the plan, in a small world that keeps books."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpustack.server.controllers.rolling import (
    Add,
    Copy,
    Facts,
    Forget,
    GiveUp,
    Keep,
    Phase,
    Plan,
    Remove,
    Room,
    needs_room,
    plan_roll,
)

P = Phase


@dataclass
class Row:
    """An instance: what the server knows of it, and its engine."""

    id: int
    version: int
    worker: int | None = None
    engine: Phase = P.WAITING  # in truth
    said: Phase = P.WAITING  # as its worker said last
    deleting: bool = False
    lost: bool = False
    replaced_by: int | None = None
    fallback: int | None = None


@dataclass
class Machine:
    """
    Attributes:
        here: it is connected.
        lost: the server has waited for long enough.
        leftovers: engines of instances that the server has forgotten.
    """

    places: int
    here: bool = True
    lost: bool = False
    leftovers: list[int] = field(default_factory=list)


@dataclass
class World:
    """One model on some workers, whose places are all of one size."""

    machines: dict[int, Machine]
    replicas: int = 1
    version: int = 1
    rows: dict[int, Row] = field(default_factory=dict)
    made: int = 0

    # --- what the server sees --------------------------------------------------------------

    def phase(self, row: Row) -> Phase:
        if row.deleting:
            return P.STOPPING
        if row.worker is None:
            return P.WAITING
        return P.AWAY if row.lost or not self.machines[row.worker].here else row.said

    def copies(self) -> list[Copy]:
        found = []
        for row in self.rows.values():
            machine = self.machines.get(row.worker or 0)
            lost = bool(machine and machine.lost) if row.deleting else row.lost
            if row.deleting and machine and not machine.here and not lost:
                continue
            found.append(
                Copy(
                    row.id, row.version, row.version == self.version, self.phase(row), row.worker,
                    row.fallback, name=f"m-{row.id}", lost=lost, replaced_by=row.replaced_by,
                )
            )  # fmt: skip
        return found

    def free(self, without: int | None = None) -> list[int]:
        taken = [row.worker for row in self.rows.values() if row.id != without]
        return [
            id for id, one in self.machines.items() if one.here and taken.count(id) < one.places
        ]

    def plan(self) -> Plan:
        copies, room = self.copies(), None
        if needs_room(copies):
            old = [c for c in copies if c.worker and not c.wanted and not c.lost]
            instead = {c.id for c in old if self.free(without=c.id)}
            room = Room(next(iter(self.free()), None), frozenset(instead), "full")
        return plan_roll(Facts(self.replicas, self.version, copies, room))

    def running(self) -> set[int]:
        """Those that answer, as the server knows."""
        return {row.id for row in self.rows.values() if self.phase(row) is P.READY}

    # --- what the controllers do -----------------------------------------------------------

    def act(self) -> bool:
        before, plan, doubled = self.running(), self.plan(), 0
        for step in plan.steps:
            match step:
                case Add(version, fallback, replaces):
                    self.made += 1
                    self.rows[self.made] = Row(self.made, version, fallback=fallback)
                    if replaces is not None:
                        assert self.rows[replaces].lost
                        self.rows[replaces].replaced_by = self.made
                case Remove(id, rival):
                    if rival is not None and id in before:
                        assert rival in before, f"{id} ran, {rival} does not"
                        doubled += 1
                    elif id in before and self.rows[id].lost:
                        doubled += 1  # it lacks a part, and its successor runs
                    self.end(self.rows[id])
                case Forget(id):
                    self.forget(id)
                case Keep(id):
                    self.rows[id].replaced_by = None
                case GiveUp(id):
                    self.rows[id].fallback = None
        is_rolling = any(row.version != self.version for row in self.rows.values())
        left = len(self.running()) + doubled
        assert left >= min(len(before), self.replicas) - is_rolling
        return bool(plan.steps)

    def end(self, row: Row) -> None:
        if row.worker is None:
            del self.rows[row.id]
        row.deleting = True

    def forget(self, id: int) -> None:
        row = self.rows.pop(id)
        machine = self.machines[row.worker or 0]
        assert not machine.here, "what is in reach says itself when it is gone"
        machine.leftovers.append(id)

    def place(self) -> bool:
        for row in self.rows.values():
            if row.worker is None and (free := self.free()):
                row.worker, row.engine, row.said = free[0], P.STARTING, P.STARTING
                return True
        return False

    # --- what happens ----------------------------------------------------------------------

    def answer(self) -> bool:
        """An engine comes to answer; its worker says so when it can."""
        for row in self.rows.values():
            if row.engine in {P.STARTING, P.FAILED}:
                row.engine = P.READY
                return True
        return False

    def say(self) -> bool:
        """A worker says how an instance is, or that it is gone."""
        for row in list(self.rows.values()):
            if row.worker is None or not self.machines[row.worker].here:
                continue
            if row.deleting:
                del self.rows[row.id]
                return True
            if row.lost or row.said is not row.engine:
                row.said, row.lost = row.engine, False
                return True
        return False

    def fall_silent(self, id: int) -> None:
        self.machines[id].here = False

    def lose(self, id: int) -> None:
        machine = self.machines[id]
        machine.lost = not machine.here
        for row in self.rows.values():
            row.lost = row.lost or (machine.lost and row.worker == id)

    def stay_away(self, id: int) -> None:
        self.fall_silent(id)
        self.lose(id)

    def crash(self, id: int) -> None:
        for row in self.rows.values():
            if row.worker == id and row.engine is P.READY:
                row.engine = P.FAILED  # it is started again

    def come_back(self, id: int) -> None:
        """The worker hears at once what is gone."""
        machine = self.machines[id]
        machine.here, machine.lost = True, False
        machine.leftovers.clear()

    def delete_instance(self, number: int) -> None:
        if self.rows:
            self.end(list(self.rows.values())[number % len(self.rows)])

    def delete_worker(self, id: int) -> None:
        self.rows = {key: row for key, row in self.rows.items() if row.worker != id}
        self.machines[id] = Machine(self.machines[id].places)

    def by_itself(self, number: int) -> None:
        (self.place, self.answer, self.say)[number]()

    def scale(self, replicas: int) -> None:
        self.replicas = replicas

    def roll(self, version: int) -> None:
        self.version = version

    def happen(self, steps: "Steps") -> None:
        for (name, number), looks, at_rest in steps:
            if at_rest:
                self.settle()
            getattr(self, name)(number)
            for _ in range(looks):
                self.act()

    # --- how it ends -----------------------------------------------------------------------

    def settle(self) -> None:
        for _ in range(500):
            if not any([self.act(), self.place(), self.answer(), self.say()]):
                break
        else:
            raise AssertionError(f"it never ends: {self.rows}")
        kept = [row for row in self.rows.values() if not row.deleting and not row.lost]
        # A roll waits for what is silent, with one instance more.
        waits = any(self.phase(row) is P.AWAY or row.version != self.version for row in kept)
        assert self.replicas <= len(kept) <= self.replicas + waits
        for row in self.rows.values():
            assert row.lost or row.replaced_by is None
            assert not (row.deleting and self.machines[row.worker or 0].lost)

    def all_back(self) -> None:
        for id in self.machines:
            self.come_back(id)


WORKERS = st.integers(1, 3)
HAPPENINGS: dict[str, st.SearchStrategy[int]] = {
    "by_itself": st.integers(0, 2),
    "fall_silent": WORKERS,
    "lose": WORKERS,
    "stay_away": WORKERS,
    "crash": WORKERS,
    "come_back": WORKERS,
    "delete_instance": st.integers(0, 5),
    "delete_worker": WORKERS,
    "scale": st.integers(0, 3),
    "roll": st.integers(1, 2),
}
STEP = st.one_of(
    *(st.tuples(st.just(name), number) for name, number in HAPPENINGS.items()),
    *[st.tuples(st.just("by_itself"), st.integers(0, 2))] * 4,
    *[st.tuples(st.just(name), WORKERS) for name in ("stay_away", "come_back")] * 3,
)
#: What happens, how often the controller looks then, and whether nothing else happens first.
STEPS = st.lists(st.tuples(STEP, st.integers(0, 2), st.booleans()), min_size=12, max_size=30)
Steps = list[tuple[tuple[str, int], int, bool]]


@settings(max_examples=100, deadline=None)
@given(STEPS, st.integers(1, 3))
def test_whatever_happens_what_runs_is_kept_and_at_rest_every_place_has_one(
    steps: Steps, replicas: int
) -> None:
    world = World({id: Machine(places=9) for id in (1, 2, 3)}, replicas)
    world.settle()
    world.happen(steps)
    world.settle()  # with those away that are away
    world.all_back()
    world.settle()
    assert len(world.running()) == len(world.rows) == world.replicas
    assert {row.version for row in world.rows.values()} <= {world.version}
    assert not any(machine.leftovers for machine in world.machines.values())


@settings(max_examples=100, deadline=None)
@given(STEPS, st.integers(1, 3), st.lists(st.integers(1, 2), min_size=3))
def test_where_there_is_little_room_nothing_is_doubled_and_nothing_flaps(
    steps: Steps, replicas: int, places: list[int]
) -> None:
    world = World({id: Machine(places[id - 1]) for id in (1, 2, 3)}, replicas)
    world.settle()
    world.happen(steps)
    world.settle()
    world.all_back()
    world.settle()
    assert len(world.running()) == world.replicas


# --- two in one place: the table of docs/decisions/0029 ---------------------------------------


def pair(old: Phase, new: Phase, *, version: int = 1, new_version: int = 1) -> Plan:
    """What is done when 1, which was lost, and 2, which was made in its place, are this."""
    copies = [
        Copy(1, version, version == 1, old, worker=1, replaced_by=2),
        Copy(2, new_version, new_version == 1, new, worker=None if new is P.WAITING else 2),
    ]
    return plan_roll(Facts(1, 1, copies, Room(3)))


OLD_GOES, NEW_GOES, BOTH_STAY = (Remove(1, rival=2),), (Remove(2, rival=1),), ()


@pytest.mark.parametrize(
    ("old", "by_new"),
    [
        (P.READY, dict.fromkeys((P.WAITING, P.FAILED, P.STARTING, P.AWAY), NEW_GOES)),
        (P.READY, {P.READY: OLD_GOES}),
        (P.STARTING, {P.WAITING: NEW_GOES, P.FAILED: NEW_GOES, P.STARTING: OLD_GOES}),
        (P.STARTING, {P.AWAY: BOTH_STAY, P.READY: OLD_GOES}),
        (P.FAILED, {P.WAITING: NEW_GOES, P.FAILED: OLD_GOES, P.STARTING: OLD_GOES}),
        (P.FAILED, {P.AWAY: BOTH_STAY, P.READY: OLD_GOES}),
        (P.AWAY, dict.fromkeys((P.WAITING, P.FAILED, P.STARTING, P.AWAY), BOTH_STAY)),
        (P.AWAY, {P.READY: OLD_GOES}),
    ],
)
def test_of_two_in_one_place_the_one_that_runs_stays(
    old: Phase, by_new: dict[Phase, tuple[Remove, ...]]
) -> None:
    assert {new: pair(old, new).steps for new in by_new} == by_new


def test_of_two_that_run_in_one_place_the_wanted_version_stays() -> None:
    """The model was rolled, or rolled back, while the old one was away."""
    assert pair(P.READY, P.READY, version=0).steps == OLD_GOES
    assert pair(P.READY, P.READY, new_version=2).steps == NEW_GOES
    assert pair(P.READY, P.STARTING, version=0).steps == NEW_GOES  # the roll begins anew


def lost(id: int, phase: Phase = P.AWAY, **more: Any) -> Copy:
    return Copy(id, 1, True, phase, worker=1, lost=True, **more)


def one(id: int, phase: Phase = P.READY, **more: Any) -> Copy:
    return Copy(id, 1, True, phase, worker=2, **more)


def planned(replicas: int, *copies: Copy) -> tuple[object, ...]:
    return plan_roll(Facts(replicas, 1, copies, Room(3))).steps


def test_each_lost_one_gets_one_successor_as_far_as_instances_are_wanted() -> None:
    assert planned(2, lost(1), one(2)) == (Add(1, replaces=1),)
    assert planned(2, lost(1, replaced_by=3), one(2), one(3, P.WAITING)) == ()
    assert planned(1, lost(1), one(2)) == ()  # the model was made smaller
    assert planned(2, lost(1), lost(2)) == (Add(1, replaces=1), Add(1, replaces=2))
    assert planned(3, lost(1), one(2)) == (Add(1, replaces=1), Add(1))


def test_a_lost_successor_gets_a_successor_of_its_own() -> None:
    chain = (lost(1, replaced_by=2), lost(2))
    assert planned(1, *chain) == (Add(1, replaces=2),)
    assert planned(1, lost(1, replaced_by=2), lost(2, replaced_by=3), one(3)) == ()
    back = (one(1, replaced_by=2), lost(2, replaced_by=3))
    assert planned(1, *back, one(3)) == (Remove(1, rival=3),)
    assert planned(1, *back, one(3, P.STARTING)) == (Remove(3, rival=1),)
    assert planned(1, one(1, replaced_by=2), lost(2)) == (Remove(2, rival=1),)
    assert planned(1, one(1, P.STARTING, replaced_by=2), lost(2)) == ()  # and none in addition


def test_what_is_not_wanted_at_all_goes_though_it_is_lost() -> None:
    assert planned(0, lost(1, replaced_by=2), one(2)) == (Remove(1),)
    assert planned(0, lost(1, P.STOPPING), one(2)) == (Forget(1),)
    assert planned(1, lost(1, P.STOPPING), one(2)) == (Forget(1),)


def test_one_that_returns_alone_is_kept() -> None:
    assert planned(1, one(1, replaced_by=2)) == (Keep(1),)
    assert planned(1, one(1, replaced_by=2), one(2, P.STOPPING)) == (Keep(1),)


@pytest.mark.parametrize("broken", [P.STARTING, P.FAILED])
def test_one_that_has_lost_a_part_serves_until_another_does(broken: Phase) -> None:
    """Its own worker is in reach; an engine that lacks a part mostly hangs or fails."""
    new = one(2, P.STARTING)
    assert planned(1, lost(1, P.READY)) == (Add(1, replaces=1),)
    assert planned(1, lost(1, P.READY, replaced_by=2), new) == ()
    assert planned(1, lost(1, P.READY, replaced_by=2), one(2)) == (Remove(1),)
    assert planned(1, lost(1, broken, replaced_by=2), new) == (Remove(1),)


def test_while_the_wanted_version_fails_a_lost_one_of_the_old_is_replaced_by_its_like() -> None:
    old = Copy(1, 7, wanted=False, phase=P.AWAY, worker=1, lost=True)
    broken = Copy(2, 8, wanted=True, phase=P.FAILED, worker=2)
    plan = plan_roll(Facts(2, 8, [old, broken], Room(3)))
    assert plan.steps == (Add(7, replaces=1),)
    assert plan_roll(Facts(1, 8, [old], Room(3))).steps == (Add(8, replaces=1),)
