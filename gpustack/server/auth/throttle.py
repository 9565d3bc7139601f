"""How often somebody may try a password. Why these numbers: docs/decisions/0020-login-throttle.md.

Nobody is locked out: whoever is refused is told how long to wait, at most LONGEST_S, and what an
account meets from elsewhere does not concern addresses that have logged in to it.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from ipaddress import IPv6Address, IPv6Network
from typing import Any, Final

from gpustack.errors import GPUStackError, TooMany, Unauthorized
from gpustack.lib.net import parse_ip
from gpustack.lib.secrets import digest

#: Failures that cost no waiting: of one account from one address, from an address, of an account.
PAIR_FREE, ADDRESS_FREE, ACCOUNT_FREE = 5, 20, 20
#: The first wait is of a second, and each failure doubles it.
LONGEST_S: Final = 60.0
#: After this long one failure is forgotten.
FORGET_S: Final = 60.0
#: Remembered of each kind; the one that was longest not touched goes.
REMEMBERED: Final = 10_000


class Failures:
    """PURE: failures by key. They are forgotten one by one."""

    def __init__(self, free: int) -> None:
        self._free = free
        self._last: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()  # how many, when

    def __len__(self) -> int:
        return len(self._last)

    def wait_s(self, key: Hashable, now: float) -> float:
        """Until the next attempt; 0 or less: now."""
        count, at = self._last.get(key, (0.0, now))
        if count < self._free:
            return 0.0
        delay_s: float = min(2.0 ** (count - self._free), LONGEST_S)
        return at + delay_s - now

    def add(self, key: Hashable, now: float) -> None:
        """One more, from now on."""
        count, at = self._last.pop(key, (0.0, now))
        left = max(count - (now - at) / FORGET_S, 0.0)
        # No more than what the longest wait needs: else that would go on long after an attack.
        most = self._free + math.log2(LONGEST_S)
        self._last[key] = min(left + 1, most), now
        _limit(self._last)

    def of(self, key: Hashable) -> tuple[float, float] | None:
        """How many there were, and when the last was."""
        return self._last.get(key)

    def take_back(self, key: Hashable, before: tuple[float, float] | None) -> None:
        """Forget one; with it, that it was the last, unless there were others meanwhile.

        Args:
            before: what there was before that one.
        """
        if key in self._last:
            count, at = self._last[key]
            since = before[1] if before is not None and count <= before[0] + 1 else at
            self._last[key] = max(count - 1, 0.0), since

    def forget(self, key: Hashable) -> None:
        self._last.pop(key, None)


class Attempt:
    """One look at a password.

    Attributes:
        right: set by whoever found it to be so.
    """

    def __init__(self) -> None:
        self.right = False


class Throttle:
    """Who may try a password now.

    It is asked before anything is looked up, so an account that does not exist is refused like one
    that does. Each server counts what it sees itself.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pairs = Failures(PAIR_FREE)
        self._addresses = Failures(ADDRESS_FREE)
        self._accounts = Failures(ACCOUNT_FREE)
        self._known: OrderedDict[Hashable, bool] = OrderedDict()  # has logged in from there
        self._turns: OrderedDict[Hashable, float] = OrderedDict()  # when a promised one comes

    @contextmanager
    def attempt(self, account: str, peer: str) -> Iterator[Attempt]:
        """Around one look at a password for `account` that the address `peer` asks for.

        It counts as failed from its beginning, so that many at once are as many; not if it was
        right, nor if an error kept it from being found out.

        Raises:
            TooMany: not yet; says when.
        """
        # The user name is whatever a stranger sent: its digest is short.
        name, place = digest(account), _network(peer)
        wait_s = self._wait_s(name, place)
        if wait_s > 0:
            seconds = math.ceil(wait_s)
            raise TooMany(
                f"too many failed attempts: try again in {seconds} s", retry_after_s=seconds
            )
        counted: list[tuple[Failures, Hashable]] = [
            (self._pairs, (name, place)), (self._addresses, place), (self._accounts, name),
        ]  # fmt: skip
        before = [failures.of(key) for failures, key in counted]
        for failures, key in counted:
            failures.add(key, self._clock())
        attempt = Attempt()
        found_out = True
        try:
            yield attempt
        except GPUStackError as error:
            found_out = isinstance(error, Unauthorized)
            raise
        finally:
            if attempt.right or not found_out:
                for (failures, key), had in zip(counted, before, strict=True):
                    failures.take_back(key, had)
            if not found_out:
                self._turns[name, place] = self._clock()  # what was promised still is
                _limit(self._turns)
            if attempt.right:
                self._pairs.forget((name, place))
                self._known[name, place] = True
                self._known.move_to_end((name, place))
                _limit(self._known)

    def _wait_s(self, name: str, place: str) -> float:
        now, pair = self._clock(), (name, place)
        wait_s = self._pairs.wait_s(pair, now)
        if pair in self._known:
            return wait_s
        wait_s = max(wait_s, self._addresses.wait_s(place, now))
        if wait_s > 0:
            return wait_s
        return self._turn_in_s(pair, self._accounts.wait_s(name, now), now)

    def _turn_in_s(self, pair: Hashable, wait_s: float, now: float) -> float:
        """`wait_s` from now, for whoever asks first; from then on what that asker was promised.

        Else others could use up each moment at which the account may be tried again.
        """
        turn_in_s = min(self._turns.get(pair, now + wait_s) - now, wait_s)
        if turn_in_s > 0:
            self._turns.setdefault(pair, now + wait_s)
            _limit(self._turns)
        else:
            self._turns.pop(pair, None)
        return turn_in_s


def _limit(table: OrderedDict[Hashable, Any]) -> None:
    if len(table) > REMEMBERED:
        table.popitem(last=False)


def _network(peer: str) -> str:
    """What one sender has for itself: an IPv4 address, or 64 bits of an IPv6 one."""
    address = parse_ip(peer)
    if isinstance(address, IPv6Address):
        return str(IPv6Network((address, 64), strict=False))
    return str(address or peer)
