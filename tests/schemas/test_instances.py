"""The instance's state machine."""

import itertools

import pytest

from gpustack.schemas.instances import InstanceState as S
from gpustack.schemas.instances import can_move, shown_state


def test_the_documented_path_is_legal() -> None:
    path = [S.PENDING, S.SCHEDULED, S.DOWNLOADING, S.STARTING, S.RUNNING, S.STOPPING, S.GONE]
    assert all(can_move(old, new) for old, new in itertools.pairwise(path))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (S.PENDING, S.RUNNING),
        (S.RUNNING, S.PENDING),
        (S.RUNNING, S.SCHEDULED),
        (S.STOPPING, S.RUNNING),
        (S.GONE, S.RUNNING),
        (S.GONE, S.STOPPING),
        (S.PENDING, S.ERROR),
    ],
)
def test_shortcuts_are_not(old: S, new: S) -> None:
    assert not can_move(old, new)


@pytest.mark.parametrize("state", [S.SCHEDULED, S.DOWNLOADING, S.STARTING, S.RUNNING, S.ERROR])
def test_whatever_is_placed_may_fail_fall_silent_and_be_stopped(state: S) -> None:
    assert all(can_move(state, new) for new in (S.ERROR, S.UNREACHABLE, S.STOPPING, S.GONE))


@pytest.mark.parametrize(
    ("facts", "shown"),
    [
        ({"placed": False}, S.PENDING),
        ({"placed": True}, S.SCHEDULED),
        ({"placed": True, "reported": S.RUNNING}, S.RUNNING),
        ({"placed": True, "reported": S.RUNNING, "unreachable": True}, S.UNREACHABLE),
        ({"placed": True, "reported": S.RUNNING, "deleting": True}, S.STOPPING),
    ],
)
def test_the_state_shown_comes_from_the_servers_facts_and_the_workers_report(
    facts: dict[str, object], shown: S
) -> None:
    full: dict[str, object] = {"deleting": False, "unreachable": False, "reported": None} | facts
    assert shown_state(**full) is shown  # type: ignore[arg-type]
