from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpustack.schemas.instances import AssignedInstance, InstanceState
from gpustack.schemas.models import Source, VersionSpec
from gpustack.worker.reconcile import (
    Attempts,
    Decision,
    Failure,
    Observed,
    Phase,
    Policy,
    Report,
    Start,
    Stop,
    Trouble,
    World,
    after_failure,
    decide,
)
from tests.support.control_plane import assigned

SPEC = VersionSpec(source=Source.LOCAL_PATH, local_path="/m.gguf")
POLICY = Policy()
CRASH = Failure(Trouble.EXITED, "the engine exited with code 1", "boom", code=1)


def instance(id: int = 1, **more: Any) -> AssignedInstance:
    return assigned(id, SPEC, **more)


def world(*instances: AssignedInstance, **more: Any) -> World:
    nothing: dict[str, Any] = {
        "desired": {one.id: one for one in instances},
        "synced": True,
        "engines": {},
        "attempts": {},
        "stopped": set(),
        "now": 1000.0,
    }
    return World(**{**nothing, **more})


def failed(*failures: Failure, now: float = 1000.0, generation: int = 1) -> Attempts:
    attempts: Attempts | None = None
    for count, failure in enumerate(failures):
        attempts = after_failure(
            attempts, failure, generation=generation, restart_count=count, now=now, policy=POLICY
        )
    assert attempts is not None
    return attempts


def reported(decision: Decision) -> list[InstanceState]:
    return [action.status.state for action in decision.actions if isinstance(action, Report)]


def test_a_new_instance_is_started_as_its_first_start() -> None:
    one = instance()
    assert decide(world(one)).actions == [Start(one, 0)]


@pytest.mark.parametrize("state", [InstanceState.RUNNING, InstanceState.ERROR])
def test_an_instance_that_had_been_started_before_counts_on(state: InstanceState) -> None:
    one = instance(state=state, restart_count=2)
    assert decide(world(one)).actions == [Start(one, 3)]


@pytest.mark.parametrize(
    ("phase", "states"),
    [
        (Phase.ADOPTED, []),  # nothing that the server does not know
        (Phase.PREPARING, []),
        (Phase.DOWNLOADING, ["downloading"]),
        (Phase.STARTING, ["starting"]),
        (Phase.RUNNING, ["running"]),
        (Phase.ENDING, []),
    ],
)
def test_an_engines_phase_is_what_is_reported(phase: Phase, states: list[str]) -> None:
    assert reported(decide(world(instance(), engines={1: Observed(phase)}))) == states


def test_an_engine_that_is_ended_because_it_failed_is_in_error_at_once() -> None:
    engine = Observed(Phase.ENDING, port=1, pid=2, failure=CRASH)
    (report,) = decide(world(instance(), engines={1: engine})).actions
    assert isinstance(report, Report)
    assert (report.status.state, report.status.port) == (InstanceState.ERROR, None)
    assert report.status.state_message == "the engine exited with code 1\nboom"


def test_a_deleted_instance_is_stopped_first_and_gone_then() -> None:
    one = instance(deleting=True, generation=2)
    assert decide(world(one, engines={1: Observed(Phase.RUNNING)})).actions == [Stop(1)]
    drained = instance(deleting=True, drain=True)
    assert decide(world(drained, engines={1: Observed(Phase.RUNNING)})).actions == [Stop(1, True)]
    (report,) = decide(world(one, stopped={1})).actions
    assert isinstance(report, Report)
    assert report.status.state is InstanceState.GONE
    assert report.status.observed_generation == 2


def test_absence_means_nothing_before_the_list_is_complete() -> None:
    running = {1: Observed(Phase.RUNNING)}
    assert decide(world(synced=False, engines=running)).actions == []
    assert decide(world(synced=True, engines=running)).actions == [Stop(1)]


def test_what_was_stopped_and_is_not_wanted_is_reported_gone() -> None:
    assert reported(decide(world(stopped={1}))) == ["gone"]
    assert reported(decide(world(attempts={1: failed(CRASH)}))) == ["gone"]


def test_a_failed_instance_waits_and_says_when_to_look_again() -> None:
    attempts = failed(CRASH)
    decision = decide(world(instance(), attempts={1: attempts}))
    assert reported(decision) == ["error"]
    assert decision.again_at == 1010.0
    late = world(instance(), attempts={1: attempts}, now=1010.0)
    assert decide(late).actions == [Start(instance_of(late), 1)]


def instance_of(world: World) -> AssignedInstance:
    return world.desired[1]


def test_waiting_doubles_up_to_five_minutes() -> None:
    ran = replace(CRASH, ran_s=5.0)
    waits = [failed(*[ran] * count).retry_at - 1000 for count in range(1, 8)]
    assert waits == [10, 20, 40, 80, 160, 300, 300]


def test_ten_minutes_of_running_forget_the_failures_before() -> None:
    ran = replace(CRASH, ran_s=5.0)
    long = replace(CRASH, ran_s=600.0)
    assert failed(ran, ran, ran, long).retry_at == 1010.0


def test_the_same_failure_three_times_before_running_waits_five_minutes() -> None:
    assert failed(CRASH, CRASH).retry_at == 1020.0
    third = failed(CRASH, CRASH, CRASH)
    assert third.retry_at == 1300.0
    assert third.message == (
        "the engine exited with code 1 (3 times alike, next try in 300 s)\nboom"
    )
    other = replace(CRASH, code=2)
    assert failed(CRASH, CRASH, other).retry_at == 1040.0
    ran = replace(CRASH, ran_s=1.0)
    assert failed(CRASH, CRASH, ran).retry_at == 1040.0


def test_a_new_generation_is_tried_at_once_and_starts_afresh() -> None:
    attempts = failed(CRASH, CRASH, CRASH)
    again = instance(generation=2)
    decision = decide(world(again, attempts={1: attempts}))
    assert decision.actions == [Start(again, 3)]
    fourth = after_failure(attempts, CRASH, generation=2, restart_count=3, now=0.0, policy=POLICY)
    assert (fourth.failures, fourth.alike, fourth.retry_at) == (1, 1, 10.0)


def test_an_instance_that_must_not_restart_is_left_in_error_for_ever() -> None:
    one = instance(restart_on_error=False)
    decision = decide(world(one, attempts={1: failed(CRASH)}, now=1e9))
    assert reported(decision) == ["error"]
    assert decision.again_at is None


def test_a_port_taken_in_between_counts_as_nothing() -> None:
    taken = Failure(Trouble.PORT_TAKEN, "another program took port 1 first")
    attempts = failed(taken)
    assert (attempts.failures, attempts.retry_at, attempts.next_count) == (0, 1000.0, 0)
    assert failed(CRASH, taken).failures == 1


def test_a_port_that_is_taken_again_and_again_backs_off_like_any_failure() -> None:
    taken = Failure(Trouble.PORT_TAKEN, "another program took port 1 first")
    ran = replace(CRASH, ran_s=1.0)
    waits = [failed(*[taken] * count).retry_at - 1000 for count in range(1, 6)]
    assert waits == [0, 0, 10, 20, 300]
    assert failed(taken, taken, taken).next_count == 3
    assert failed(taken, taken, ran, taken).retry_at == 1000


def test_a_message_has_no_control_characters() -> None:
    failure = Failure(
        Trouble.FILES, "file not found: /a\x1b[31m\x00\x07b\x9bm c", "last\x1b]0;t\x07"
    )
    assert failure.message == "file not found: /ab c\nlast"
    assert "(3 times alike" in failed(failure, failure, failure).message
    assert not set("\x1b\x00\x07\x9b") & set(failed(failure, failure, failure).message)


def test_no_free_port_is_tried_again_without_waiting_longer_each_time() -> None:
    full = Failure(Trouble.NO_PORT, "no free port")
    attempts = failed(full, full, full, full)
    assert attempts.retry_at == 1010.0


PHASES = st.sampled_from(list(Phase))
IDS = st.integers(1, 4)


@given(
    wanted=st.dictionaries(IDS, st.booleans()),
    engines=st.dictionaries(IDS, PHASES),
    stopped=st.sets(IDS),
    synced=st.booleans(),
)
def test_no_decision_starts_a_second_engine_or_stops_a_wanted_one(
    wanted: dict[int, bool], engines: dict[int, Phase], stopped: set[int], synced: bool
) -> None:
    instances = [instance(id, deleting=deleting) for id, deleting in wanted.items()]
    observed = {id: Observed(phase) for id, phase in engines.items()}
    seen = world(*instances, engines=observed, stopped=stopped - set(engines), synced=synced)
    for action in decide(seen).actions:
        match action:
            case Start(one, _):
                assert one.id not in engines
                assert wanted[one.id] is False
            case Stop(id):
                assert id in engines
                assert wanted.get(id) is True or (id not in wanted and synced)
            case Report(id, status):
                gone = status.state is InstanceState.GONE
                assert gone == (id not in engines and wanted.get(id) is not False)
    assert decide(seen) == decide(seen)
