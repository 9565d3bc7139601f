"""How often passwords may be tried."""

import math
import re
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpustack.errors import DatabaseAway, TooMany, Unauthorized
from gpustack.lib.secrets import digest
from gpustack.server.auth import throttle
from gpustack.server.auth.throttle import (
    ACCOUNT_FREE,
    ADDRESS_FREE,
    FORGET_S,
    LONGEST_S,
    PAIR_FREE,
    Failures,
    Throttle,
)

HOME, ELSEWHERE = "198.51.100.7", "203.0.113.5"


class World:
    """A throttle, its clock, and who tries."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.throttle = Throttle(lambda: self.now)

    def attempt(self, account: str, peer: str, *, right: bool = False) -> int | None:
        """Seconds to wait; None: the password was looked at."""
        try:
            with suppress(Unauthorized), self.throttle.attempt(account, peer) as attempt:
                attempt.right = right
                if not right:
                    raise Unauthorized
        except TooMany as error:
            return int(re.search("try again in ([0-9]+) s$", str(error))[1])  # type: ignore[index]
        return None

    def storm(self, account: str, addresses: Iterator[str], seconds: int) -> int:
        """Each second every address tries once; answers how many passwords were looked at."""
        known, looked = list(addresses), 0
        for _ in range(seconds):
            looked += sum(self.attempt(account, one) is None for one in known)
            self.now += 1
        return looked


def addresses(count: int) -> Iterator[str]:
    return (f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}" for n in range(count))


@pytest.fixture
def world() -> World:
    return World()


def test_a_few_slips_cost_nothing_and_more_cost_ever_longer_waits(world: World) -> None:
    for _ in range(PAIR_FREE):
        assert world.attempt("a", HOME) is None
    waits = []
    for _ in range(9):
        wait_s = world.attempt("a", HOME)
        assert wait_s is not None
        waits.append(wait_s)
        world.now += wait_s
        assert world.attempt("a", HOME) is None
    assert waits[:4] == [1, 2, 4, 8]
    assert waits == sorted(waits)
    assert max(waits) <= LONGEST_S


def test_a_right_password_starts_anew(world: World) -> None:
    for _ in range(3):
        for _ in range(PAIR_FREE - 1):
            assert world.attempt("a", HOME) is None
        assert world.attempt("a", HOME, right=True) is None


def test_attempts_at_the_same_time_are_as_many(world: World) -> None:
    open_ones = [world.throttle.attempt("a", HOME) for _ in range(PAIR_FREE)]
    for one in open_ones:
        one.__enter__()
    assert world.attempt("a", HOME, right=True) == 1
    for one in open_ones:
        with suppress(Unauthorized):
            one.__exit__(Unauthorized, Unauthorized(), None)


def test_what_was_never_looked_at_does_not_count(world: World) -> None:
    for _ in range(10 * ADDRESS_FREE):
        with suppress(DatabaseAway), world.throttle.attempt("a", HOME):
            raise DatabaseAway
    assert world.attempt("a", HOME) is None


def test_a_right_password_that_could_not_be_taken_is_let_in_again_at_once(world: World) -> None:
    for _ in range(PAIR_FREE + 4):
        while world.attempt("a", HOME):
            world.now += 1
    while (wait_s := world.throttle._wait_s(digest("a"), HOME)) > 0:
        world.now += wait_s
    with suppress(DatabaseAway), world.throttle.attempt("a", HOME):
        raise DatabaseAway
    assert world.attempt("a", HOME, right=True) is None


def test_who_leaves_before_the_answer_has_tried_all_the_same(world: World) -> None:
    for _ in range(PAIR_FREE):
        with suppress(KeyboardInterrupt), world.throttle.attempt("a", HOME):
            raise KeyboardInterrupt
    assert world.attempt("a", HOME) == 1


def test_one_address_cannot_go_through_the_accounts(world: World) -> None:
    tried = [world.attempt(f"user{n}", HOME) for n in range(ADDRESS_FREE + 5)]
    assert tried == [None] * ADDRESS_FREE + [1] * 5
    # Nor by logging in to its own in between.
    assert world.attempt("mine", HOME, right=True) == 1
    world.now += 1
    assert world.attempt("mine", HOME, right=True) is None
    assert world.attempt("user99", HOME) is None
    assert world.attempt("user98", HOME) == 2


def test_many_addresses_cannot_try_one_account_as_often_as_they_like(world: World) -> None:
    looked = world.storm("a", addresses(50), seconds=600)
    # At first what is free, then each address once in the longest wait.
    assert looked <= ACCOUNT_FREE + 50 * (600 / LONGEST_S + 1)
    assert World().storm("a", addresses(1), seconds=600) <= PAIR_FREE + 6 + 600 / LONGEST_S


def test_an_address_that_has_logged_in_before_notices_no_attack_from_elsewhere(
    world: World,
) -> None:
    assert world.attempt("a", HOME, right=True) is None
    world.storm("a", addresses(50), seconds=120)
    assert world.attempt("a", ELSEWHERE) is not None
    for _ in range(PAIR_FREE):
        assert world.attempt("a", HOME) is None
    world.now += 1
    assert world.attempt("a", HOME, right=True) is None


def test_from_an_address_of_ones_own_account_others_are_no_easier(world: World) -> None:
    assert world.attempt("mine", HOME, right=True) is None
    tried = [world.attempt(f"user{n}", HOME) for n in range(ADDRESS_FREE + 1)]
    assert tried[-1] == 1


def test_the_owner_gets_in_from_anywhere_after_a_bounded_wait_while_the_attack_goes_on(
    world: World,
) -> None:
    attackers = list(addresses(100))
    world.storm("a", iter(attackers), seconds=100)
    wait_s = world.attempt("a", HOME, right=True)
    assert wait_s is not None
    assert wait_s <= LONGEST_S
    world.storm("a", iter(attackers), seconds=wait_s)
    assert world.attempt("a", HOME, right=True) is None


def test_what_was_promised_stays_when_the_attempt_could_not_be_made(world: World) -> None:
    attackers = list(addresses(100))
    world.storm("a", iter(attackers), seconds=100)
    wait_s = world.attempt("a", HOME)
    assert wait_s
    world.storm("a", iter(attackers), seconds=wait_s)
    with suppress(DatabaseAway), world.throttle.attempt("a", HOME):
        raise DatabaseAway
    world.storm("a", iter(attackers), seconds=1)
    assert world.attempt("a", HOME, right=True) is None


def test_one_ipv6_network_is_one_address(world: World) -> None:
    for n in range(PAIR_FREE):
        assert world.attempt("a", f"2001:db8:0:1::{n}") is None
    assert world.attempt("a", "2001:db8:0:1:ffff::1") == 1
    assert world.attempt("a", "2001:db8:0:2::1") is None


def test_ipv4_in_ipv6_is_ipv4(world: World) -> None:
    for _ in range(PAIR_FREE):
        assert world.attempt("a", f"::ffff:{HOME}") is None
    assert world.attempt("a", HOME) == 1


def test_failures_are_forgotten(world: World) -> None:
    while world.attempt("a", HOME) is None:
        pass
    world.now += FORGET_S * (PAIR_FREE + math.log2(LONGEST_S))
    for _ in range(PAIR_FREE):
        assert world.attempt("a", HOME) is None


def test_memory_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle, "REMEMBERED", 100)
    for n, address in enumerate(addresses(1000)):
        world.attempt(f"user{n}", address, right=n % 2 == 0)
        world.attempt("a", address)
    tables = [table for table in vars(world.throttle).values() if hasattr(table, "__len__")]
    assert len(tables) == 5
    assert all(len(table) <= 100 for table in tables)


@given(st.lists(st.floats(0, 200), max_size=80), st.integers(1, 20))
def test_no_wait_is_longer_than_the_longest(pauses: list[float], free: int) -> None:
    failures, now = Failures(free), 0.0
    for pause in pauses:
        now += pause
        assert failures.wait_s("k", now) <= LONGEST_S
        failures.add("k", now)
    assert failures.wait_s("k", now + LONGEST_S) <= 0
