"""PURE: what must be there, by what was acknowledged; and what may be, by what was cut.

A request that was cut happened as a whole or not at all: what is seen afterwards decides which.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

#: An object: its kind and its name.
Key = tuple[str, str]
Facts = Mapping[str, Any]
#: Objects with what is known of each; None: it is gone, or about to go.
World = Mapping[Key, Facts | None]


@dataclass(frozen=True)
class Entry:
    """What the audit log must say of one change.

    Attributes:
        says: the new value of the field that every change of such an object changes.
    """

    action: str
    kind: str
    name: str
    says: str | None = None


@dataclass(frozen=True)
class Change:
    """What a request does, if it does anything.

    Attributes:
        after: of each object that it changes, the facts that are new.
    """

    after: World
    audited: tuple[Entry, ...] = ()


@dataclass
class Known:
    """What one user of the API knows of the objects whose names begin with `prefix`.

    Attributes:
        there: by what was acknowledged.
        cut: the change that was asked for and not answered.
        audited: what the audit log must have, each once.
        done: how many changes there were.
    """

    prefix: str
    there: dict[Key, Facts | None] = field(default_factory=dict)
    cut: Change | None = None
    audited: Counter[Entry] = field(default_factory=Counter)
    done: int = 0

    def acknowledge(self, change: Change) -> None:
        self.done += 1
        self.there = merged(self.there, change.after)
        self.audited.update(change.audited)

    def settle(self, seen: World) -> bool | None:
        """Compare with what is seen; answer whether the change that was cut has happened.

        None: there was none.

        Raises:
            AssertionError: it is neither what was before that change nor what comes of it.
        """
        cut, self.cut = self.cut, None
        without = [*self._differences(self.there, seen)]
        if cut is None:
            assert not without, f"acknowledged, and not there: {without}"
            return None
        # First, since what nobody said before may be anything.
        with_it = [*self._differences(merged(self.there, cut.after), seen)]
        if not with_it:
            self.acknowledge(cut)
            return True
        assert not without, f"{cut} is half done:\nit lacks {with_it}\nit has {without}"
        return False

    def named(self, kind: str) -> list[str]:
        """The objects of a kind that are there."""
        return [name for (of, name), facts in self.there.items() if of == kind and facts]

    def _differences(self, wanted: World, seen: World) -> Iterator[str]:
        for key, facts in wanted.items():
            there = seen.get(key)
            if facts is None or there is None:
                if facts is not there:
                    yield f"{key}: want {facts}, got {there}"
                continue
            for name, value in facts.items():
                if there.get(name) != value:
                    yield f"{key}: {name}: want {value!r}, got {there.get(name)!r}"
        for kind, name in seen.keys() - wanted.keys():
            # Instances are the controllers' to make.
            if name.startswith(self.prefix) and kind != "model-instances":
                yield f"{(kind, name)}: nobody made it"


@dataclass
class Count:
    """A number in a model's description that several count up, each comparing what it has read.

    Attributes:
        open: requests that were not answered.
        settled: what was seen the last time.
    """

    model_id: int
    acknowledged: int = 0
    open: int = 0
    settled: int = 0

    def settle(self, seen: int) -> range:
        """Compare with what is seen. Answers the numbers that it became since the last time."""
        most = self.acknowledged + self.open
        assert self.acknowledged <= seen <= most, f"{self} became {seen}"
        self.acknowledged, self.open = seen, 0
        new, self.settled = range(self.settled + 1, seen + 1), seen
        return new


def merged(before: World, after: World) -> dict[Key, Facts | None]:
    """`before` with what is new of each object."""
    new = {
        key: None if facts is None else {**(before.get(key) or {}), **facts}
        for key, facts in after.items()
    }
    return {**before, **new}
