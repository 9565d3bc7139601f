"""One engine, owned by one task from its spawn to the end of its last process."""

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from gpustack.backends.base import Limits as Limits
from gpustack.lib import platform
from gpustack.lib.net import can_bind
from gpustack.lib.secrets import Secret
from gpustack.worker.ports import LOOPBACK
from gpustack.worker.reconcile import Failure, Observed, Phase, Trouble
from gpustack.worker.supervisor.diagnosis import TAIL_BYTES, explain
from gpustack.worker.supervisor.draining import until_idle
from gpustack.worker.supervisor.engine_log import last_words, start_log, tail
from gpustack.worker.supervisor.groups import end_group, groups_by_uid
from gpustack.worker.supervisor.probing import Prober
from gpustack.worker.supervisor.records import Record, Records, Unwritten, pid_of

T = TypeVar("T")

#: Seconds between two reports of a download's progress.
PROGRESS_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """A process to start, ready to be spawned.

    Attributes:
        record: without a pid.
        environment: all of it.
    """

    record: Record
    environment: Mapping[str, str]
    secret: Secret


Prepare = Callable[[Callable[[float], None]], Coroutine[Any, Any, Plan | Failure]]


class Engine:
    """An engine and what is seen of it.

    Exactly one of `start` and `adopt` is run, by a task of its own. Cancelling that task lets go
    of the engine, which keeps running; `stop` ends it.

    Args:
        limits: instead of those that its backend says.
        changed: told, without arguments, each time `observed` is another.
    """

    def __init__(
        self, records: Records, limits: Limits | None, changed: Callable[[], None]
    ) -> None:
        self.observed = Observed(Phase.PREPARING)
        self._records = records
        self._given_limits = limits
        self._limits = limits or Limits()
        self._changed = changed
        self._stop = asyncio.Event()
        self._drain = asyncio.Event()
        self._done = asyncio.Event()
        self._running_since: float | None = None
        self._progress_at: float | None = None
        self._oom_kills: tuple[int | None, int | None] = (None, None)

    @property
    def is_stopping(self) -> bool:
        return self._stop.is_set()

    async def stop(self) -> None:
        """Return when no process of the engine is alive, or its owner has let go of it."""
        self._stop.set()
        await self._done.wait()

    def ask_to_stop(self) -> None:
        """Like `stop`, without waiting."""
        self._stop.set()

    def ask_to_drain(self) -> None:
        """Like `ask_to_stop`, once the requests that it is answering have ended."""
        if self.observed.phase in {Phase.RUNNING, Phase.ADOPTED}:
            self._drain.set()
        else:
            self._stop.set()

    async def start(self, prepare: Prepare, restart_count: int) -> Failure | None:
        """Run a new engine until it is gone: None if it was told to stop, else why it failed.

        Args:
            prepare: fetches files and chooses a port; is told how to show progress, percent.
        """
        self._see(restart_count=restart_count)
        try:
            plan = await self._unless_stopped(prepare(self._fetching))
            if plan is None or isinstance(plan, Failure):
                return plan
            self._see(phase=Phase.STARTING, progress=None, port=plan.record.port)
            try:
                child, record = self._spawn(plan)
            except Unwritten as error:
                self._records.remove(plan.record.uid)
                return Failure(Trouble.SPAWN, str(error))
            except (OSError, ValueError) as error:  # ValueError: a zero byte in the command
                self._records.remove(plan.record.uid)
                return Failure(Trouble.SPAWN, f"cannot run {plan.record.argv[0]}: {error}")
            try:
                return await self._tend(record, plan.secret, child)
            finally:
                if child.returncode is None:
                    child.returncode = 0  # let go: Popen's finaliser would complain about it
        finally:
            self._done.set()

    async def adopt(self, record: Record) -> Failure | None:
        """Own a running engine that another agent started, as `start` does from its spawn on."""
        self._see(
            phase=Phase.ADOPTED,
            port=record.port,
            pid=record.pid,
            restart_count=record.restart_count,
        )
        try:
            return await self._tend(record, record.secret(), None)
        finally:
            self._done.set()

    # --- parts of the owner's task ---------------------------------------------------------

    def _see(self, **now: Any) -> None:
        self.observed = replace(self.observed, **now)
        self._changed()

    def _fetching(self, percent: float) -> None:
        now = asyncio.get_running_loop().time()
        if self._progress_at is None or now - self._progress_at >= PROGRESS_EVERY_S:
            self._progress_at = now
            self._see(phase=Phase.DOWNLOADING, progress=percent)

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        async with asyncio.TaskGroup() as group:
            worked = group.create_task(work)
            stopped = group.create_task(self._stop.wait())
            await asyncio.wait({worked, stopped}, return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            worked.cancel()
        return None if worked.cancelled() or self._stop.is_set() else worked.result()

    def _spawn(self, plan: Plan) -> tuple["subprocess.Popen[bytes]", Record]:
        """Start the process. Nothing can come between the spawn and its record: no await."""
        record = plan.record
        self._records.put_secret(record.uid, plan.secret)
        self._records.put(record)
        try:
            log = start_log(Path(record.log_file))
        except OSError as error:
            raise Unwritten(record.log_file, error) from error
        try:
            child = subprocess.Popen(
                record.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**plan.environment, **self._records.environment(record.uid)},
                start_new_session=True,
            )
        finally:
            os.close(log)
        started = {"pid": child.pid, "start_ticks": platform.start_ticks(child.pid)}
        record = record.model_copy(update=started)
        try:
            self._records.put(record)
        except OSError:  # a full disk: an engine that cannot be found again must not live
            platform.kill_group(child.pid, force=True)
            child.wait()
            raise
        self._see(pid=child.pid)
        return child, record

    async def _tend(
        self, record: Record, secret: Secret, child: "subprocess.Popen[bytes] | None"
    ) -> Failure | None:
        self._limits = self._given_limits or record.limits
        self._oom_kills = (platform.oom_kills(),) * 2
        try:
            failure = await self._until_over(record, secret, child)
            if failure is not None:
                failure = self._explained(failure, record, secret)
        except asyncio.CancelledError:
            raise  # let go
        except BaseException:
            await self._end(record, child)
            self._records.remove(record.uid)
            raise
        # An early exit may turn out to be about a port only: that is no news for anybody.
        shown = None if failure and _may_be_port(failure) else failure
        self._see(phase=Phase.ENDING, failure=shown)
        await self._end(record, child)
        if failure is not None and _port_was_taken(failure, record.port):
            failure = Failure(Trouble.PORT_TAKEN, f"another program took port {record.port} first")
        self._records.remove(record.uid)
        return None if self._stop.is_set() else failure

    def _explained(self, failure: Failure, record: Record, secret: Secret) -> Failure:
        """`failure` with what it means, where anybody knows, and the engine's last words."""
        log = Path(record.log_file)
        before, after = self._oom_kills[0], platform.oom_kills()
        more = None if before is None or after is None else after > before
        if failure.trouble is not Trouble.EXITED:
            more = False
        text = f"{tail(log, TAIL_BYTES)}\n{failure.sentence}"
        meaning = explain(text, code=failure.code, oom_killed=more)
        sentence = f"{failure.sentence}: {meaning}" if meaning else failure.sentence
        words = last_words(log, secret=secret.reveal())
        return replace(failure, sentence=sentence, last_words=words)

    async def _until_over(
        self, record: Record, secret: Secret, child: "subprocess.Popen[bytes] | None"
    ) -> Failure | None:
        """Wait until it exits, fails or is to stop; None: it is to stop."""
        async with asyncio.TaskGroup() as group:
            exited = group.create_task(platform.wait_exit(pid_of(record)))
            stopped = group.create_task(self._stop.wait())
            probed = group.create_task(self._probe(record, secret))
            drained = group.create_task(self._drained(record, secret))
            waiting: set[asyncio.Task[Any]] = {exited, stopped, probed, drained}
            await asyncio.sleep(0)  # now the exit is watched: what lives from here on is seen
            gone = child is None and not record.is_alive
            if not gone:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()
        if self._stop.is_set():
            return None
        if gone or not exited.cancelled():
            return self._exit_failure(child)
        return probed.result()

    async def _drained(self, record: Record, secret: Secret) -> None:
        """Once it is to go and has nothing left to answer, or took too long, it is to stop."""
        await self._drain.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.drain_s):
                await asyncio.sleep(self._limits.hear_s)
                await until_idle(record.port, secret, record.busy_gauges)
        self._stop.set()

    def _exit_failure(self, child: "subprocess.Popen[bytes] | None") -> Failure:
        ran_s = self._ran_s()
        when = "" if ran_s is not None or child is None else " before it answered"
        code = child.poll() if child else None
        if child is None:
            how = "exited with an unknown code: an earlier agent had started it"
        elif code is not None and code < 0:
            name = platform.signal_name(-code)
            how = f"was ended by signal {-code}" + (f" ({name})" if name else "")
        else:
            how = f"exited with code {code}"
        return Failure(Trouble.EXITED, f"the engine {how}{when}", code=code, ran_s=ran_s)

    async def _probe(self, record: Record, secret: Secret) -> Failure:
        """Ask the engine whether it works, until it should and does not."""
        prober = Prober(record, secret, self._limits)
        if not record.ready:
            if (failure := await prober.until_ready()) is not None:
                return failure
            self._running()
            with contextlib.suppress(OSError):  # a full disk: adopted, it would count as starting
                self._records.put(record.model_copy(update={"ready": True}))
        failure = await prober.until_unwell(self._running)
        return replace(failure, ran_s=self._ran_s() or 0.0)

    def _running(self) -> None:
        # The last but one: the kernel counts before the process has ended.
        self._oom_kills = (self._oom_kills[1], platform.oom_kills())
        if self.observed.phase is not Phase.RUNNING:
            self._running_since = asyncio.get_running_loop().time()
            self._see(phase=Phase.RUNNING)

    def _ran_s(self) -> float | None:
        if self._running_since is None:
            return None
        return asyncio.get_running_loop().time() - self._running_since

    async def _end(self, record: Record, child: "subprocess.Popen[bytes] | None") -> None:
        """End every process of the engine, also those that left its group."""
        limit_s = self._limits.stop_s
        if record.is_alive or (child is not None and child.returncode is None):
            reap = child.poll if child else None
            await end_group(pid_of(record), limit_s=limit_s, reap=reap)
        # Once its leader is reaped a group's number may be another's: what is left of ours is
        # known by the environment.
        for group in groups_by_uid(self._records.home).get(record.uid, set()):
            await end_group(group, limit_s=limit_s)


def _port_was_taken(failure: Failure, port: int) -> bool:
    """Whether the engine ended while something else has its port. It is gone by now.

    Its own words are not asked: they may quote a path, or a prompt.
    """
    if not _may_be_port(failure):
        return False
    return not can_bind(LOOPBACK, port)


def _may_be_port(failure: Failure) -> bool:
    return failure.trouble is Trouble.EXITED and failure.ran_s is None
