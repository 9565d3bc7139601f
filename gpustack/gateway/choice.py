"""PURE: which instance answers a request."""

from collections.abc import Sequence
from typing import NamedTuple


class Candidate(NamedTuple):
    """What is known of one instance.

    Attributes:
        outstanding: requests under way, of all gateway processes of this node.
        resting: it failed a moment ago.
        last_resort: its worker is silent; it may well answer.
    """

    outstanding: int
    resting: bool = False
    last_resort: bool = False


def choose(candidates: Sequence[Candidate], turn: int) -> int | None:
    """The index of the best candidate; None without any.

    Healthy ones before those that rest, and those before the last resorts; then the one with
    the fewest outstanding requests. Equals take turns: `turn` counts requests.
    """
    if not candidates:
        return None
    best = min((c.last_resort, c.resting, c.outstanding) for c in candidates)
    equals = [
        index
        for index, c in enumerate(candidates)
        if (c.last_resort, c.resting, c.outstanding) == best
    ]
    return equals[turn % len(equals)]
