"""Drains, silence, failures, rolls and changes of size in any order: the plan, with its books."""

from dataclasses import dataclass, field, replace

from hypothesis import given, settings
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
from tests.server import test_models_lost as lost
from tests.server.test_models_lost import Machine, Row

P = Phase


@dataclass
class World(lost.World):
    """
    Attributes:
        closed: workers that take nothing new.
        drained: those of them that are drained.
        broken: workers on which no engine comes to answer.
        wide: an instance that is placed now has a part on a second worker, where there is one.
        parts: instance -> worker of its second part, which claims nothing.
    """

    closed: set[int] = field(default_factory=set)
    drained: set[int] = field(default_factory=set)
    broken: set[int] = field(default_factory=set)
    wide: bool = False
    parts: dict[int, int] = field(default_factory=dict)

    # --- what the server sees --------------------------------------------------------------

    def part_lost(self, row: Row) -> bool:
        return row.id in self.parts and self.machines[self.parts[row.id]].lost

    def phase(self, row: Row) -> Phase:
        is_known = row.worker is None or row.deleting or not self.part_lost(row)
        return super().phase(row if is_known else replace(row, lost=False))

    def copies(self) -> list[Copy]:
        full = "" if self.free() else "full"
        found = []
        for one in super().copies():
            on = {one.worker, self.parts.get(one.id)}
            leaving = next((f"w{id}" for id in self.drained if id in on), "")
            found.append(replace(one, leaving=leaving, said=full))
        return found

    def free(self, without: int | None = None) -> list[int]:
        return [id for id in super().free(without) if id not in self.closed]

    def plan(self) -> Plan:
        copies, room = self.copies(), None
        if self.replicas and needs_room(copies):
            old = [c for c in copies if c.worker and not (c.wanted or c.leaving or c.lost)]
            placed = [c for c in old if c.phase is not P.STOPPING]
            instead = frozenset(c.id for c in placed if self.free(without=c.id))
            room = Room(next(iter(self.free()), None), instead, "full")
        return plan_roll(Facts(self.replicas, self.version, copies, room))

    def groups(self) -> int:
        """Places that are taken: those in the place of one another share it."""
        kept = {row.id: row for row in self.rows.values() if not row.deleting and not row.lost}
        paired = 0
        for row in kept.values():
            new = self.rows.get(row.replaced_by or 0)
            while new is not None and new.lost and new.replaced_by in self.rows:
                new = self.rows[new.replaced_by]
            paired += new is not None and new.id in kept
        return len(kept) - paired

    # --- what the controllers do -----------------------------------------------------------

    def act(self) -> bool:
        plan, before = self.plan(), self.running()
        to_leave = {one.id for one in self.copies() if one.leaving}
        goes = {s.id for s in plan.steps if isinstance(s, Remove) and s.rival is None} & to_leave
        did = super().act()
        if goes & before:
            assert len(self.running()) >= min(len(before), self.replicas), "it made room"
        if any(isinstance(step, Add) for step in plan.steps):
            assert self.groups() <= self.replicas + 1, plan
        return did

    def place(self) -> bool:
        waiting = [row for row in self.rows.values() if row.worker is None]
        placed = super().place()
        for row in waiting:
            others = [id for id in self.free() if id != row.worker]
            if self.wide and row.worker is not None and others:
                self.parts[row.id] = others[0]
        return placed

    # --- what happens ----------------------------------------------------------------------

    def answer(self) -> bool:
        for row in self.rows.values():
            works = row.worker not in self.broken
            if row.engine is P.STARTING or (row.engine is P.FAILED and works):
                row.engine = P.READY if works else P.FAILED
                return True
        return False

    def say(self) -> bool:
        for row in list(self.rows.values()):
            if row.lost and self.part_lost(row) and self.machines[row.worker or 0].here:
                was = row.said
                row.said = row.engine
                if row.deleting:
                    del self.rows[row.id]
                if row.deleting or was is not row.engine:
                    return True
        kept = {id: row for id, row in self.rows.items() if row.lost and self.part_lost(row)}
        self.rows = {id: row for id, row in self.rows.items() if id not in kept}
        said = super().say()
        self.rows = dict(sorted((self.rows | kept).items()))
        return said

    def lose(self, id: int) -> None:
        super().lose(id)
        for row in self.rows.values():
            row.lost = row.lost or self.part_lost(row)

    def spread(self, number: int) -> None:
        self.wide = number > 1

    def cordon(self, id: int) -> None:
        self.closed.add(id)
        self.drained.discard(id)

    def drain(self, id: int) -> None:
        self.closed.add(id)
        self.drained.add(id)

    def uncordon(self, id: int) -> None:
        self.closed.discard(id)
        self.drained.discard(id)

    def break_down(self, id: int) -> None:
        self.broken.add(id)

    def mend(self, id: int) -> None:
        self.broken.discard(id)

    def delete_worker(self, id: int) -> None:
        super().delete_worker(id)
        for row in self.rows.values():
            if self.parts.get(row.id) == id:
                del self.parts[row.id]
                row.deleting = True
        self.uncordon(id)

    # --- how it ends -----------------------------------------------------------------------

    def settle(self) -> None:
        for _ in range(500):
            if not any([self.act(), self.place(), self.answer(), self.say()]):
                break
        else:
            raise AssertionError(f"it never ends: {self.rows}")
        self.check_rest()

    def check_rest(self) -> None:
        plan, copies = self.plan(), {copy.id: copy for copy in self.copies()}
        kept = [copy for copy in copies.values() if copy.phase is not P.STOPPING and not copy.lost]
        stays = [copy for copy in kept if copy.stays]
        unready = [copy for copy in kept if copy.phase is not P.READY]
        away = [copy for copy in kept if copy.phase is P.AWAY]
        # One more that does not answer yet, for one that is to go; one that is away with its like.
        assert self.groups() >= self.replicas
        assert self.groups() <= self.replicas + bool(unready and len(stays) < len(kept)), plan
        assert len(kept) <= self.groups() + len(away)
        for row in self.rows.values():
            machine = self.machines.get(row.worker or 0)
            assert not (row.deleting and machine and machine.lost)
            if row.replaced_by is not None and not row.lost:  # which of them stays is not known
                assert away or self.rows[row.replaced_by].lost
        if len(stays) < len(kept):
            assert plan.why or away, "what is to leave is there, and nobody says why"


WORKERS = st.integers(1, 3)
HAPPENINGS: dict[str, st.SearchStrategy[int]] = lost.HAPPENINGS | {
    name: WORKERS for name in ("cordon", "drain", "uncordon", "break_down", "mend", "spread")
}
STEP = st.one_of(
    *(st.tuples(st.just(name), number) for name, number in HAPPENINGS.items()),
    *[st.tuples(st.just("by_itself"), st.integers(0, 2))] * 4,
    *[st.tuples(st.just(name), WORKERS) for name in ("stay_away", "come_back", "drain")] * 3,
)
STEPS = st.lists(st.tuples(STEP, st.integers(0, 2), st.booleans()), min_size=8, max_size=30)


@settings(max_examples=100, deadline=None)
@given(STEPS, st.integers(1, 3))
def test_whatever_happens_together_at_rest_every_place_has_one_that_may_stay(
    steps: lost.Steps, replicas: int
) -> None:
    world = World({id: Machine(places=9) for id in (1, 2, 3)}, replicas)
    world.settle()
    world.happen(steps)
    world.settle()
    world.all_back()
    world.settle()
    for id in (1, 2, 3):
        world.mend(id)
    world.settle()
    if len(world.closed) < 3:
        assert len(world.running()) == len(world.rows) == world.replicas
        assert not [row for row in world.rows.values() if row.worker in world.drained]
        assert {row.version for row in world.rows.values()} <= {world.version}
    world.scale(0)
    world.settle()
    assert not world.rows
    assert not any(machine.leftovers for machine in world.machines.values())


@settings(max_examples=100, deadline=None)
@given(STEPS, st.integers(1, 3), st.lists(st.integers(1, 2), min_size=3, max_size=3))
def test_where_there_is_little_room_nothing_flaps_or_is_doubled(
    steps: lost.Steps, replicas: int, places: list[int]
) -> None:
    world = World({id: Machine(places[id - 1]) for id in (1, 2, 3)}, replicas)
    world.settle()
    world.happen(steps)
    world.settle()
    world.all_back()
    for id in (1, 2, 3):
        world.mend(id)
        world.uncordon(id)
    world.settle()
    assert len(world.running()) == min(world.replicas, sum(places))
