"""What to do next: instances assigned to this worker against engines that it runs. Pure.

A decision is made anew from everything that is known each time anything changes, so a missed or
repeated hint changes nothing. `worker.control` carries decisions out.
"""

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from gpustack.lib.backoff import delay_s
from gpustack.lib.text import plain
from gpustack.schemas.instances import AssignedInstance, InstanceState, InstanceStatus


class Phase(StrEnum):
    """Where an engine is between its start and its end."""

    ADOPTED = "adopted"  # found alive at our start; has not answered us yet
    PREPARING = "preparing"  # a port, a program and its files are looked for; no process yet
    DOWNLOADING = "downloading"  # its files are being fetched; no process yet
    STARTING = "starting"  # its process is there, or about to be, and does not answer yet
    RUNNING = "running"  # it has answered a real request
    ENDING = "ending"  # its processes are being ended: it failed, or was told to stop


class Trouble(StrEnum):
    """What went wrong. Two failures are the same if kind and exit code are."""

    FILES = "files"  # the model's files are not there, or cannot be fetched
    BACKEND = "backend"  # nothing on this worker can run it
    NO_PORT = "no_port"  # the service port range is used up
    PORT_TAKEN = "port_taken"  # another program was faster; no fault of the engine
    SPAWN = "spawn"  # the command cannot be run at all
    EXITED = "exited"  # it ended by itself
    NOT_READY = "not_ready"  # it did not answer within the start-up limit
    UNFIT = "unfit"  # it answers at its health path and fails requests
    UNHEALTHY = "unhealthy"  # it answered, then no longer, or got no request done


#: Nothing was started: such an instance is tried again even if it must not restart.
PORT_TROUBLES: Final = frozenset({Trouble.NO_PORT, Trouble.PORT_TAKEN})


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an engine is no more.

    Attributes:
        sentence: for people, one line.
        last_words: the end of the engine's own log; "" if it never had one.
        code: exit code; negative for a signal; None when there is none or nobody knows it.
        ran_s: seconds since it first answered; None: it never did.
    """

    trouble: Trouble
    sentence: str
    last_words: str = ""
    code: int | None = None
    ran_s: float | None = None

    @property
    def message(self) -> str:
        """For people: no control characters, whatever a path or a log had in it."""
        text = f"{self.sentence}\n{self.last_words}" if self.last_words else self.sentence
        return plain(text)


@dataclass(frozen=True, slots=True)
class Observed:
    """An engine as its owner sees it now."""

    phase: Phase
    port: int | None = None
    pid: int | None = None
    restart_count: int = 0
    progress: float | None = None
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Attempts:
    """What is remembered of an instance whose engine failed, until it is started again and after.

    Attributes:
        generation: of the instance that the failures belong to; another one starts afresh.
        failures: in a row, without `Policy.reset_after_s` of running in between.
        alike: of those, how many at the end were the same and before running.
        ports_taken: failures in a row that found the port taken; the first ones do not count.
        retry_at: monotonic seconds.
        restart_count: of the start that failed last.
        next_count: of the next start.
    """

    generation: int
    failures: int
    alike: int
    failure: Failure
    message: str
    retry_at: float
    restart_count: int
    next_count: int
    ports_taken: int = 0


@dataclass(frozen=True, slots=True)
class Policy:
    """How long to wait after failures, seconds.

    Attributes:
        free_ports: so many starts in a row may find their port taken and cost nothing.
    """

    first_s: float = 10.0
    limit_s: float = 300.0
    reset_after_s: float = 600.0
    alike_limit: int = 3
    free_ports: int = 2


@dataclass(frozen=True, slots=True)
class World:
    """All that a decision rests on.

    Attributes:
        synced: whether a whole list has been seen; before that, absence means nothing.
        stopped: instances whose engines were ended for good and whose end is not reported yet.
        now: monotonic seconds.
    """

    desired: Mapping[int, AssignedInstance]
    synced: bool
    engines: Mapping[int, Observed]
    attempts: Mapping[int, Attempts]
    stopped: Set[int]
    now: float


@dataclass(frozen=True, slots=True)
class Start:
    instance: AssignedInstance
    restart_count: int


@dataclass(frozen=True, slots=True)
class Stop:
    """
    Attributes:
        drain: once the requests that it is answering have ended.
    """

    instance_id: int
    drain: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """The status of an instance as it is now; the reporter knows what was said before."""

    instance_id: int
    status: InstanceStatus


Action = Start | Stop | Report


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now, and when time alone will change it (monotonic seconds; None: never)."""

    actions: list[Action] = field(default_factory=list)
    again_at: float | None = None


def decide(world: World) -> Decision:
    """Actions that bring engines to what is desired, and what to tell the server."""
    actions: list[Action] = []
    again: list[float] = []
    for id in sorted({*world.desired, *world.engines, *world.attempts, *world.stopped}):
        instance, engine = world.desired.get(id), world.engines.get(id)
        if instance is None or instance.deleting:
            actions += _unwanted(world, id, instance, engine)
        elif engine is not None:
            if (status := _status_of(instance, engine)) is not None:
                actions.append(Report(id, status))
        else:
            actions += _idle(instance, world.attempts.get(id), world.now, again)
    return Decision(actions, min(again, default=None))


def _unwanted(
    world: World, id: int, instance: AssignedInstance | None, engine: Observed | None
) -> Iterator[Action]:
    """It is being deleted, is gone, or is not known to be wanted yet."""
    if instance is None and not world.synced:
        return
    if engine is not None:
        yield Stop(id, drain=instance is not None and instance.drain)
    else:
        generation = instance.generation if instance else 0
        yield Report(id, InstanceStatus(state=InstanceState.GONE, observed_generation=generation))


def _idle(
    instance: AssignedInstance, attempts: Attempts | None, now: float, again: list[float]
) -> Iterator[Action]:
    """It is wanted and nothing runs."""
    if attempts is None:
        yield Start(instance, first_count(instance))
        return
    is_new = attempts.generation != instance.generation
    may_again = instance.restart_on_error or attempts.failure.trouble in PORT_TROUBLES
    if is_new or (may_again and attempts.retry_at <= now):
        yield Start(instance, attempts.next_count)
        return
    if may_again:
        again.append(attempts.retry_at)
    yield Report(
        instance.id,
        InstanceStatus(
            state=InstanceState.ERROR,
            state_message=attempts.message,
            observed_generation=instance.generation,
            restart_count=attempts.restart_count,
        ),
    )


def first_count(instance: AssignedInstance) -> int:
    """The restart count of the first start in this agent's life.

    An instance that the server has heard of before was started before.
    """
    untold = {InstanceState.PENDING, InstanceState.SCHEDULED, InstanceState.DOWNLOADING}
    is_first = instance.state in untold and instance.restart_count == 0
    return 0 if is_first else instance.restart_count + 1


def _status_of(instance: AssignedInstance, engine: Observed) -> InstanceStatus | None:
    """What an engine's phase means to the server. None: nothing that it does not know."""
    states = {
        Phase.DOWNLOADING: InstanceState.DOWNLOADING,
        Phase.STARTING: InstanceState.STARTING,
        Phase.RUNNING: InstanceState.RUNNING,
        Phase.ENDING: InstanceState.ERROR,
    }
    state = states.get(engine.phase)
    if state is None or (engine.phase is Phase.ENDING and engine.failure is None):
        return None
    return InstanceStatus(
        state=state,
        state_message=engine.failure.message if engine.failure else "",
        observed_generation=instance.generation,
        port=engine.port if engine.phase is not Phase.ENDING else None,
        pid=engine.pid if engine.phase is not Phase.ENDING else None,
        restart_count=engine.restart_count,
        download_progress=engine.progress if state is InstanceState.DOWNLOADING else None,
    )


def after_failure(
    before: Attempts | None,
    failure: Failure,
    *,
    generation: int,
    restart_count: int,
    now: float,
    policy: Policy,
) -> Attempts:
    """What is remembered once an engine of `generation`, the `restart_count`th, has failed."""
    if before is not None and before.generation != generation:
        before = None
    if failure.ran_s is not None and failure.ran_s >= policy.reset_after_s:
        before = None
    failures = (before.failures if before else 0) + 1
    alike = 0
    if failure.ran_s is None:
        alike = before.alike + 1 if before and _same(before.failure, failure) else 1
    wait_s = delay_s(failures, first_s=policy.first_s, limit_s=policy.limit_s)
    message = failure.message
    next_count = restart_count + 1
    ports_taken = 0
    if failure.trouble is Trouble.PORT_TAKEN:
        ports_taken = (before.ports_taken if before else 0) + 1
    if 0 < ports_taken <= policy.free_ports:
        failures, alike, wait_s, next_count = failures - 1, 0, 0.0, restart_count
    elif failure.trouble is Trouble.NO_PORT:
        # Any engine that ends frees a port: waiting longer each time would only lose time.
        wait_s, next_count = policy.first_s, restart_count
    elif alike >= policy.alike_limit:
        wait_s = policy.limit_s
        said = f"{failure.sentence} ({alike} times alike, next try in {wait_s:g} s)"
        message = replace(failure, sentence=said).message
    return Attempts(
        generation=generation,
        failures=failures,
        alike=alike,
        failure=failure,
        message=message,
        retry_at=now + wait_s,
        restart_count=restart_count,
        next_count=next_count,
        ports_taken=ports_taken,
    )


def _same(left: Failure, right: Failure) -> bool:
    return (left.trouble, left.code) == (right.trouble, right.code)
