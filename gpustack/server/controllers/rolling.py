"""What to do next about a model's instances: how many, of which version. Pure.

Decided anew from everything that is known each time anything changes, so a roll goes on where it
was after a restart. One step at a time: the next is decided when the world shows what became of
the last one.

A roll replaces the instances of other versions, one by one. Where the scheduler has room for one
instance more, that one comes first and an old one goes once it answers. Else an old one goes first
and the new one gets its place; if it does not fit there after all, the old version is placed again.
The first failure of a new instance stops the roll: what is left of the old version serves.

What is on a worker that is being drained is replaced like what is of another version, but never to
make room: it goes once its successor answers, or stays.

An instance whose worker is silent for too long is lost: it does not count, so another is made in
its place. When it is heard of again, one of the two goes: see `_loser`, and decision 29.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from gpustack.lib.text import plain

#: Characters of an instance's own message that a model shows.
SAID = 300


class Phase(StrEnum):
    """What an instance is good for, from the least to the most; the first are removed first."""

    WAITING = "waiting"  # it has no worker
    FAILED = "failed"  # its engine failed, and is perhaps being started again
    STARTING = "starting"  # it is on a worker and does not answer yet
    AWAY = "away"  # its worker is silent; it may well be running
    READY = "ready"  # it answers
    STOPPING = "stopping"  # it is being ended and still holds what it claimed


_ORDER = {phase: place for place, phase in enumerate(Phase)}


@dataclass(frozen=True, slots=True)
class Copy:
    """One instance of the model.

    Attributes:
        version: id of the version that it was made with.
        wanted: that version is what the model's spec says now.
        leaving: name of the worker that it is to leave, for that one is being drained; empty: none.
        fallback: of one that waits for the place of another: the version that was there.
        worth: how well it is placed; larger is better. See `scheduler.standing`.
        said: why it is in this phase, for people.
        lost: its worker was silent beyond the grace period, and it was not heard of since.
        replaced_by: the one that was made in its place meanwhile.
    """

    id: int
    version: int
    wanted: bool
    phase: Phase
    worker: int | None = None
    fallback: int | None = None
    worth: tuple[float, ...] = ()
    name: str = ""
    said: str = ""
    leaving: str = ""
    lost: bool = False
    replaced_by: int | None = None

    @property
    def stays(self) -> bool:
        """It is what is wanted, where it may be: nothing has to take its place."""
        return self.wanted and not self.leaving


@dataclass(frozen=True, slots=True)
class Room:
    """What the scheduler says of one more instance of the wanted version.

    Attributes:
        worker: where it would go beside all that is there; None: nowhere.
        instead_of: old instances, each in whose place it would fit, if that one were gone.
        why: there is no room, for people.
    """

    worker: int | None
    instead_of: frozenset[int] = frozenset()
    why: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a decision rests on.

    Attributes:
        version: id of the version that is wanted.
        room: None: the scheduler was not asked, for `needs_room` says no, or cannot say yet.
        busy: worker -> the model that is being rolled there; on a worker one at a time is.
    """

    replicas: int
    version: int
    copies: Sequence[Copy]
    room: Room | None = None
    busy: dict[int, str] | None = None


@dataclass(frozen=True, slots=True)
class Add:
    """One more instance.

    Attributes:
        fallback: the version to place again if this one does not fit.
        replaces: the lost one in whose place it is.
    """

    version: int
    fallback: int | None = None
    replaces: int | None = None


@dataclass(frozen=True, slots=True)
class Remove:
    """
    Attributes:
        rival: of two in one place, for one of them was lost: the one that stays.
    """

    id: int
    rival: int | None = None


@dataclass(frozen=True, slots=True)
class Keep:
    """The instance was lost and stays: what was made in its place is gone, or goes."""

    id: int


@dataclass(frozen=True, slots=True)
class Forget:
    """The instance was to stop and is lost: nobody waits for its end any longer."""

    id: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The instance's claim to the place of another is gone; it waits like any other."""

    id: int


Step = Add | Remove | GiveUp | Keep | Forget


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now; without steps the model waits until something changes.

    Attributes:
        why: the model is not as its spec says although nothing is under way, for people.
        look_again: what it waits for, nobody tells of.
    """

    steps: tuple[Step, ...] = ()
    why: str = ""
    look_again: bool = False


def needs_room(copies: Iterable[Copy]) -> bool:
    """Whether `plan_roll` has to know what the scheduler says."""
    return any(
        copy.fallback is not None
        if copy.phase is Phase.WAITING and copy.wanted
        else not copy.stays and copy.phase is not Phase.STOPPING
        for copy in copies
    )


def plan_roll(facts: Facts) -> Plan:
    """The next steps towards `replicas` instances of the wanted version, none of them to leave.

    What always holds: there are never more than `replicas` + 1 instances because of a roll, and
    of those that were ready never fewer than `replicas` - 1 stay so.
    """
    if steps := tuple(_about_lost(facts)):
        return Plan(steps)
    present = (copy for copy in facts.copies if copy.phase is not Phase.STOPPING)
    live = [copy for copy in present if _counts(facts, copy)]
    new = [copy for copy in live if copy.stays]
    old = [copy for copy in live if not copy.stays]
    surplus = _surplus(facts.replicas, live, new, old)
    if surplus:
        return Plan(tuple(Remove(copy.id) for copy in surplus))
    misfit = _misfit(facts, new)
    if misfit is not None and misfit.fallback is not None:
        back = [Add(misfit.fallback)] if len(live) <= facts.replicas else []
        return Plan((GiveUp(misfit.id), *back))
    missing = facts.replicas - len(live)
    if missing > 0:
        return Plan(_added(facts, missing, new, old))
    if old:
        return _replacement(facts, live, new, old)
    return Plan(why=_trouble(new))


def _added(
    facts: Facts, missing: int, new: Sequence[Copy], old: Sequence[Copy]
) -> tuple[Step, ...]:
    # What is broken is not spread: while it is, the version that serves fills the gaps.
    is_sound = facts.room is not None and not _first(new, Phase.FAILED)
    lost = [copy for copy in facts.copies if copy.lost]
    served = (copy.version for copy in (*old, *lost) if not copy.wanted)
    newest_old = max(served, default=facts.version)
    version = facts.version if is_sound else newest_old
    places = [copy.id for copy in lost if _successor(facts, copy) is None][:missing]
    replacing = [Add(version, replaces=id) for id in places]
    return (*replacing, *(Add(version),) * (missing - len(places)))


# --- what is lost, and what comes back -------------------------------------------------------


def _about_lost(facts: Facts) -> Iterator[Step]:
    """Of each that was lost: whether its end is still waited for, and who has its place."""
    for copy in facts.copies:
        new = _successor(facts, copy)
        if copy.phase is Phase.STOPPING:
            if copy.lost:
                yield Forget(copy.id)
        elif copy.lost:
            # A part of it is lost: without that it may answer, as long as nothing else does.
            answers = copy.phase is Phase.READY and (new is None or new.phase is not Phase.READY)
            if not facts.replicas or (copy.phase is not Phase.AWAY and not answers):
                yield Remove(copy.id)
        elif new is not None and (loser := _loser(copy, new)) is not None:
            yield Remove(loser.id, rival=(copy if loser is new else new).id)
        elif new is None and copy.replaced_by is not None:
            yield Keep(copy.id)


def _successor(facts: Facts, copy: Copy) -> Copy | None:
    """What is in the place of one that was lost now: of a chain of lost ones, the last."""
    if copy.replaced_by is None:
        return None
    copies = {one.id: one for one in facts.copies if one.phase is not Phase.STOPPING}
    new = copies.get(copy.replaced_by)
    while new is not None and new.lost and new.replaced_by in copies:
        new = copies[new.replaced_by]
    return new


def _loser(old: Copy, new: Copy) -> Copy | None:
    """Which of two in one place goes: the one that is good for less; None: that is not known yet.

    Of equals it is the one that is not to stay where it is, then the one that is not wanted, then
    the old one.
    """
    phases = {old.phase, new.phase}
    if Phase.AWAY in phases and Phase.READY not in phases:
        return None  # the one that is away may well be running
    return min(
        old, new, key=lambda copy: (_ORDER[copy.phase], copy.stays, copy.wanted, copy is new)
    )


def _counts(facts: Facts, copy: Copy) -> bool:
    """Whether it is one of those that the model wants: of two in one place one is."""
    new = _successor(facts, copy)
    return not copy.lost and (new is None or new.lost or _loser(copy, new) is not None)


def _surplus(
    replicas: int, live: Sequence[Copy], new: Sequence[Copy], old: Sequence[Copy]
) -> list[Copy]:
    """Those to remove: first what does not answer, then what is placed worst.

    While an old instance waits for its successor, that one is there in addition.
    """
    unready = [copy for copy in new if copy.phase is not Phase.READY]
    successor = min(unready, key=lambda copy: copy.id) if old and unready and replicas else None
    count = len(live) - replicas - (successor is not None)
    pool = [copy for copy in live if copy is not successor]
    return sorted(pool, key=_value)[: max(count, 0)]


def _value(copy: Copy) -> tuple[object, ...]:
    """The least valuable sorts first; of equals the youngest."""
    return (_ORDER[copy.phase], copy.stays, copy.wanted, copy.worth, -copy.id)


def _misfit(facts: Facts, new: Sequence[Copy]) -> Copy | None:
    """A new instance that does not fit where it should: the place was cleared for it."""
    if facts.room is None or facts.room.worker is not None or _stopping(facts):
        return None
    held = (copy for copy in new if copy.phase is Phase.WAITING and copy.fallback is not None)
    return next(held, None)


def _stopping(facts: Facts) -> bool:
    return any(copy.phase is Phase.STOPPING for copy in facts.copies)


def _replacement(
    facts: Facts, live: Sequence[Copy], new: Sequence[Copy], old: Sequence[Copy]
) -> Plan:
    """The next step of a roll. There are as many instances as there should be."""
    if facts.room is None or _first(new, Phase.FAILED):
        return Plan(why=_trouble(new))
    waiting = [copy for copy in old if copy.phase is Phase.WAITING]
    if waiting and not _first(new, Phase.WAITING):
        # Nobody has anything of them: there is nothing to lose.
        steps: list[Step] = []
        for copy in waiting:
            steps += [Remove(copy.id), _in_place_of(facts, copy, copy.fallback)]
        return Plan(tuple(steps))
    if any(copy.phase is not Phase.READY for copy in new) or _stopping(facts):
        return Plan(why=_trouble(new))
    room, busy = facts.room, facts.busy or {}
    # On the worker that it leaves, one that leaves takes nobody's room.
    free = sorted((one for one in old if one.leaving or one.worker not in busy), key=_value)
    if not free:
        model = next(busy[copy.worker] for copy in old if copy.worker in busy)
        return Plan(why=f"waits for the roll of {model} on the same worker", look_again=True)
    return _next(facts, live, free, room, busy)


def _next(
    facts: Facts, live: Sequence[Copy], free: Sequence[Copy], room: Room, busy: dict[int, str]
) -> Plan:
    elsewhere = room.worker is not None and room.worker not in busy
    staying = [copy for copy in free if not copy.leaving]
    for copy in staying:
        fits = elsewhere or copy.id in room.instead_of
        if copy.phase in {Phase.FAILED, Phase.STARTING} and fits:  # it answers nobody
            return Plan((Remove(copy.id), _in_place_of(facts, copy, copy.version)))
    if room.worker in busy:
        why = f"waits for the roll of {busy[room.worker]} on the worker where there is room"
        return Plan(why=why, look_again=True)
    if room.worker is not None:
        return Plan((Add(facts.version),))
    place = next((copy for copy in staying if copy.id in room.instead_of), None)
    if place is None and not staying:
        why = f"{free[0].name} stays on {free[0].leaving}, for there is no room elsewhere"
        return Plan(why=f"{why}: {room.why}", look_again=True)
    if place is None:
        why = "there is no room for one more instance, nor would there be in place of an old one"
        return Plan(why=f"{why}: {room.why}", look_again=True)
    lame = next((copy for copy in live if copy.phase is not Phase.READY), None)
    if lame is not None:
        why = f"{lame.name} does not answer, so no other is stopped to make room"
        return Plan(why=why, look_again=True)
    return Plan((Remove(place.id), _in_place_of(facts, place, place.version)))


def _in_place_of(facts: Facts, copy: Copy, fallback: int | None) -> Add:
    """One of the wanted version; where `copy` was in the place of a lost one, it is too."""
    lost = (one.id for one in facts.copies if one.lost and one.replaced_by == copy.id)
    return Add(facts.version, fallback, next(lost, None))


def _first(copies: Iterable[Copy], phase: Phase) -> Copy | None:
    return next((copy for copy in copies if copy.phase is phase), None)


def _trouble(new: Sequence[Copy]) -> str:
    """Why instances of the wanted version do not answer; empty when it is a matter of time."""
    if failed := _first(new, Phase.FAILED):
        return _sentence(f"{failed.name} failed", failed.said)
    if waiting := _first(new, Phase.WAITING):
        return _sentence(f"{waiting.name} waits for a place", waiting.said) if waiting.said else ""
    if away := _first(new, Phase.AWAY):
        return f"the worker of {away.name} is silent"
    return ""


def _sentence(what: str, why: str) -> str:
    first = plain(" ".join(why.split("\n", 1)[0].split()))
    return f"{what}: {first[:SAID]}" if first else what
