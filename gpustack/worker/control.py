"""The loop that carries out decisions: engines are started, ended, adopted and reported on."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any

from gpustack.lib.logs import log_context
from gpustack.schemas.instances import AssignedInstance, InstanceState, InstanceStatus
from gpustack.schemas.models import ModelSource
from gpustack.schemas.watch import WatchEvent
from gpustack.worker.attempts import Memory
from gpustack.worker.desired import Desired
from gpustack.worker.launches import Launches
from gpustack.worker.ports import PortLeases
from gpustack.worker.reconcile import (
    Attempts,
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
from gpustack.worker.reports import Reports
from gpustack.worker.supervisor.adoption import Found, Stray
from gpustack.worker.supervisor.engine import Engine, Limits, Plan
from gpustack.worker.supervisor.groups import end_group
from gpustack.worker.supervisor.records import Record, Records

logger = logging.getLogger(__name__)


class Control:
    """Owns the engines of this worker: one task of `group` each.

    Cancelling the group lets go of all engines; `stop_all` ends them.

    Args:
        limits: for every engine, instead of those that its backend says.
    """

    def __init__(
        self,
        group: asyncio.TaskGroup,
        *,
        desired: Desired,
        memory: Memory,
        records: Records,
        launches: Launches,
        leases: PortLeases,
        policy: Policy,
        limits: Limits | None,
    ) -> None:
        self._group = group
        self._desired = desired
        self._memory = memory
        self._records = records
        self._launches = launches
        self._leases = leases
        self._policy = policy
        self._limits = limits
        self._engines: dict[int, Engine] = {}
        self._stopped: set[int] = set()
        self._ports: dict[int, int] = {}
        self._owners: set[asyncio.Task[None]] = set()
        self._clearing: dict[asyncio.Task[None], int | None] = {}
        self._leaving = False
        self._changed = asyncio.Event()
        self._now = asyncio.get_running_loop().time
        self.reports = Reports(self._forget, self._unknown)

    @property
    def instances(self) -> set[int]:
        """What is wanted of this worker, or still runs on it."""
        return {*self._desired.instances, *self.observed()}

    @property
    def sources(self) -> list[ModelSource]:
        """What the wanted instances are started from."""
        return [instance.spec for instance in self._desired.instances.values()]

    @property
    def names(self) -> dict[int, str]:
        """Of the wanted instances, by their ids."""
        return {id: instance.name for id, instance in self._desired.instances.items()}

    def observed(self) -> dict[int, Observed]:
        """By instance, its engine; what is left of one counts as one that is being ended."""
        ending = {id: Observed(Phase.ENDING) for id in self._clearing.values() if id is not None}
        return ending | {id: engine.observed for id, engine in self._engines.items()}

    def wake(self) -> None:
        """Something changed: decide anew."""
        self._changed.set()

    def hear(self, event: WatchEvent) -> None:
        """Take in one event of `Caller.follow`."""
        if (instance := self._desired.hear(event)) is not None:
            self.reports.hear(instance)
        elif event.id is not None and event.id not in self._engines:
            self._forget(event.id)
        self.wake()

    def adopt(self, found: Found) -> None:
        """Take over what an earlier agent left, before anything else is decided."""
        for record in found.alive:
            logger.info("adopting engine of %s, pid %d", record.instance_name, record.pid)
            engine = self._engine(record.instance_id)
            self._leases.hold(record.port)
            self._ports[record.instance_id] = record.port
            self._own(record.instance_id, record.generation, engine, partial(engine.adopt, record))
        for record in found.dead:
            logger.info("the engine of %s ended while no agent ran", record.instance_name)
            self._memory.put(record.instance_id, _ended_unseen(record))
        for stray in found.strays:
            self._clear(stray)

    async def run(self) -> None:
        """Decide and act at each change, until cancelled."""
        while True:
            self._changed.clear()
            self._desired.save()
            self._memory.save()
            again_at = self._act()
            try:
                async with asyncio.timeout_at(again_at):
                    await self._changed.wait()
            except TimeoutError:
                pass  # time alone has changed what to do

    async def stop_all(self) -> None:
        """End every engine, start no other, and say so; returns when all are gone."""
        self._leaving = True
        counts = {
            id: engine.observed.restart_count
            for id, engine in self._engines.items()
            if id in self._desired.instances
        }
        for engine in self._engines.values():
            engine.ask_to_stop()
        for engine in list(self._engines.values()):
            await engine.stop()
        if self._clearing:
            await asyncio.wait(self._clearing)
        for id, count in counts.items():
            said = InstanceStatus(
                state=InstanceState.ERROR,
                state_message="its worker was stopped",
                restart_count=count,
            )
            self.reports.put(id, said)

    def let_go(self) -> None:
        """Own no engine any more; those that run keep running."""
        self._leaving = True
        for owner in (*self._owners, *self._clearing):
            owner.cancel()

    # --- carrying out ----------------------------------------------------------------------

    def _act(self) -> float | None:
        if self._leaving:
            return None
        decision = decide(
            World(
                desired=self._desired.instances,
                synced=self._desired.synced,
                engines=self.observed(),
                attempts=self._memory.attempts,
                stopped=self._stopped,
                now=self._now(),
            )
        )
        for action in decision.actions:
            match action:
                case Start(instance, restart_count):
                    self._start(instance, restart_count)
                case Stop(instance_id, drain):
                    if (engine := self._engines.get(instance_id)) is not None:
                        engine.ask_to_drain() if drain else engine.ask_to_stop()
                case Report(instance_id, status):
                    self.reports.put(instance_id, status)
        return decision.again_at

    def _clear(self, stray: Stray) -> None:
        """End what is left of an engine. Until then its port is held, and its instance waits."""
        record = stray.record
        if record is not None:
            self._leases.hold(record.port)
        of = f"an engine of {record.instance_name}" if record else "an engine or a tool of before"
        logger.warning("ending what is left of %s: process groups %s", of, sorted(stray.groups))
        clearing = self._group.create_task(self._until_cleared(stray))
        self._clearing[clearing] = record.instance_id if record else None

        def cleared(task: asyncio.Task[None]) -> None:
            del self._clearing[task]
            self.wake()

        clearing.add_done_callback(cleared)

    async def _until_cleared(self, stray: Stray) -> None:
        limits = self._limits or (stray.record.limits if stray.record else Limits())
        for group in stray.groups:
            await end_group(group, limit_s=limits.stop_s)
        if stray.record is not None:
            self._records.remove(stray.record.uid)
            self._release(stray.record.port)

    def _release(self, port: int) -> None:
        """The port's engine is gone: whoever waits longest for one may try again now."""
        self._leases.release(port)
        waiting = {
            id: attempts
            for id, attempts in self._memory.attempts.items()
            if attempts.failure.trouble is Trouble.NO_PORT and id in self._desired.instances
        }
        if waiting:
            first = min(waiting, key=lambda id: waiting[id].retry_at)
            self._memory.put(first, replace(waiting[first], retry_at=self._now()))

    def _start(self, instance: AssignedInstance, restart_count: int) -> None:
        engine = self._engine(instance.id)
        self._stopped.discard(instance.id)
        self._memory.started(instance.id, restart_count)

        async def prepare(progress: Callable[[float], None]) -> Plan | Failure:
            plan = await self._launches.plan(instance, restart_count, progress)
            if isinstance(plan, Plan):
                self._ports[instance.id] = plan.record.port
            return plan

        logger.info("starting %s", instance.name)
        work = partial(engine.start, prepare, restart_count)
        self._own(instance.id, instance.generation, engine, work)
        self.wake()  # its first state is news

    def _engine(self, instance_id: int) -> Engine:
        engine = self._engines[instance_id] = Engine(self._records, self._limits, self.wake)
        return engine

    def _own(
        self,
        instance_id: int,
        generation: int,
        engine: Engine,
        work: Callable[[], Coroutine[Any, Any, Failure | None]],
    ) -> None:
        owner = self._group.create_task(self._until_gone(instance_id, generation, engine, work))
        self._owners.add(owner)
        owner.add_done_callback(self._owners.discard)

    async def _until_gone(
        self,
        instance_id: int,
        generation: int,
        engine: Engine,
        work: Callable[[], Coroutine[Any, Any, Failure | None]],
    ) -> None:
        with log_context(instance=instance_id):
            try:
                failure = await work()
            except Exception as error:  # one engine's trouble must not end the others
                logger.exception("the owner of an engine failed")
                failure = Failure(Trouble.SPAWN, f"the agent failed: {error!r}")
            del self._engines[instance_id]
            if (port := self._ports.pop(instance_id, None)) is not None:
                self._release(port)
            if failure is None:
                logger.info("stopped")
                self._stopped.add(instance_id)
            else:
                logger.warning("failed: %s", failure.message)
                self._failed(instance_id, generation, engine, failure)
            self.wake()

    def _failed(self, instance_id: int, generation: int, engine: Engine, failure: Failure) -> None:
        attempts = after_failure(
            self._memory.attempts.get(instance_id),
            failure,
            generation=generation,
            restart_count=engine.observed.restart_count,
            now=self._now(),
            policy=self._policy,
        )
        self._memory.put(instance_id, attempts)

    def _forget(self, instance_id: int) -> None:
        """The server knows that it is gone."""
        self._memory.forget(instance_id)
        self._stopped.discard(instance_id)
        if instance_id not in self._desired.instances:
            self.reports.forget(instance_id)

    def _unknown(self, instance_id: int) -> None:
        """The server does not know it: what runs for it is ended."""
        self._desired.drop(instance_id)
        self.wake()


def _ended_unseen(record: Record) -> Attempts:
    """An engine that ended while no agent watched is started again at once."""
    sentence = "the engine ended while no agent ran"
    return Attempts(
        generation=-1,  # of no instance: nothing is held against the next start
        failures=0,
        alike=0,
        failure=Failure(Trouble.EXITED, sentence),
        message=sentence,
        retry_at=0.0,
        restart_count=record.restart_count,
        next_count=record.restart_count + 1,
    )
