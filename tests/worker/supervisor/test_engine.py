import asyncio
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gpustack.backends.base import ProbeRequest
from gpustack.lib import platform
from gpustack.lib.secrets import Secret
from gpustack.worker.reconcile import Failure, Phase, Trouble
from gpustack.worker.supervisor.engine import Engine, Limits, Plan, Prepare
from gpustack.worker.supervisor.engine_log import log_path
from gpustack.worker.supervisor.groups import groups_by_uid
from gpustack.worker.supervisor.records import Record, Records
from tests.support import fake_engine
from tests.support.ports import free_ports
from tests.support.wait import soon
from tests.support.worker_node import eventually

QUICK = Limits(start_s=5, stop_s=0.3, poll_s=0.05, patience_s=0.5)


class Bench:
    """One engine to try things on."""

    def __init__(self, folder: Path) -> None:
        self.records = Records(folder)
        self.folder = folder
        self.program = str(fake_engine.install(folder / "bin"))
        self.seen: list[Phase] = []
        self.engine = self.another()

    def another(self, limits: Limits = QUICK) -> Engine:
        self.engine = Engine(self.records, limits, lambda: self.seen.append(self.phase()))
        return self.engine

    def phase(self) -> Phase:
        return self.engine.observed.phase

    def plan(self, *argv: str, fake: str = "") -> Prepare:
        port = free_ports(1)
        key = str(self.records.secret_path("u1"))
        command = argv or (self.program, "--port", str(port), "--api-key-file", key)
        record = Record(
            uid="u1",
            instance_id=1,
            instance_name="m-1",
            generation=1,
            port=port,
            secret_file=key,
            log_file=str(log_path(self.folder / "log", 1)),
            argv=list(command),
            health_path="/health",
            busy_gauges=["llamacpp:requests_processing"],
            progress_counters=["llamacpp:n_decode_total"],
            probe=ProbeRequest("/v1/completions", {"model": "m", "prompt": "1"}),
            boot_id=platform.boot_id(),
        )

        async def prepare(progress: Callable[[float], None]) -> Plan | Failure:
            environment = {**os.environ, "FAKE": fake}
            return Plan(record, environment, Secret("the secret"))

        return prepare

    def left(self) -> list[str]:
        folder = self.folder / "engines"
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    for group in groups_by_uid(tmp_path).get("u1", ()):
        platform.kill_group(group, force=True)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["/no/such/program"], "No such file"),
        (["/etc/passwd"], "Permission denied"),
        ([sys.executable, "a\0b"], "null byte"),
    ],
)
async def test_a_command_that_cannot_be_run_is_a_failure_that_leaves_nothing(
    bench: Bench, command: list[str], says: str
) -> None:
    failure = await bench.engine.start(bench.plan(*command), 0)
    assert failure is not None
    assert failure.trouble is Trouble.SPAWN
    assert failure.sentence.startswith(f"cannot run {command[0]}")
    assert says in failure.sentence
    assert bench.left() == []


async def test_an_engine_that_never_answers_is_ended_and_says_so(bench: Bench) -> None:
    deaf = bench.folder / "deaf"
    deaf.touch()
    engine = bench.another(Limits(start_s=0.3, stop_s=0.3))
    failure = await engine.start(bench.plan(fake=f"deaf-if={deaf} say=waiting"), 0)
    assert failure is not None
    assert failure.trouble is Trouble.NOT_READY
    assert failure.sentence == "the engine did not answer within 0.3 s"
    assert "waiting" in failure.last_words
    assert groups_by_uid(bench.folder) == {}
    assert Phase.RUNNING not in bench.seen


async def test_the_limits_of_its_backend_count_where_nobody_gives_others(bench: Bench) -> None:
    deaf = bench.folder / "deaf"
    deaf.touch()
    plan = await bench.plan(fake=f"deaf-if={deaf}")(lambda _: None)
    assert isinstance(plan, Plan)
    own = replace(plan, record=plan.record.model_copy(update={"limits": Limits(start_s=0.2)}))

    async def prepare(progress: Callable[[float], None]) -> Plan | Failure:
        return own

    engine = Engine(bench.records, None, lambda: None)
    failure = await engine.start(prepare, 0)
    assert failure is not None
    assert failure.sentence == "the engine did not answer within 0.2 s"


async def test_an_engine_that_is_told_to_stop_while_it_starts_is_gone_at_once(
    bench: Bench,
) -> None:
    async with asyncio.TaskGroup() as group:
        owner = group.create_task(bench.engine.start(bench.plan(fake="delay=60"), 0))
        await eventually(lambda: bench.engine.observed.pid)
        await bench.engine.stop()
        assert groups_by_uid(bench.folder) == {}
        assert bench.left() == []
    assert owner.result() is None


async def test_an_engine_that_is_told_to_stop_while_its_files_are_fetched_is_never_spawned(
    bench: Bench,
) -> None:
    async def endless(progress: Callable[[float], None]) -> Plan | Failure:
        progress(10.0)
        await asyncio.Event().wait()
        raise AssertionError

    async with asyncio.TaskGroup() as group:
        owner = group.create_task(bench.engine.start(endless, 0))
        await eventually(lambda: bench.phase() is Phase.DOWNLOADING)
        assert bench.engine.observed.progress == 10.0
        await bench.engine.stop()
    assert owner.result() is None
    assert bench.left() == []


async def test_an_engine_that_is_to_drain_is_ended_once_it_has_no_request_left(
    bench: Bench,
) -> None:
    busy = bench.folder / "busy"
    busy.touch()
    engine = bench.another(replace(QUICK, hear_s=0.01))
    log = log_path(bench.folder / "log", 1)
    async with asyncio.TaskGroup() as group:
        owner = group.create_task(engine.start(bench.plan(fake=f"busy-if={busy}"), 0))
        await eventually(lambda: bench.phase() is Phase.RUNNING)
        engine.ask_to_drain()
        await eventually(lambda: log.read_text().count("metrics\n") >= 3)
        assert bench.phase() is Phase.RUNNING
        busy.unlink()
    assert owner.result() is None
    assert log.read_text().count("metrics\n") >= 5  # it was found idle twice
    assert bench.left() == []


@pytest.mark.skipif(platform.connections_to(1) is None, reason="this system does not say it")
async def test_an_engine_that_does_not_say_what_it_has_is_drained_by_its_connections(
    bench: Bench,
) -> None:
    engine = bench.another(replace(QUICK, hear_s=0.01))
    log = log_path(bench.folder / "log", 1)
    async with asyncio.TaskGroup() as group:
        owner = group.create_task(engine.start(bench.plan(fake="mute"), 0))
        await eventually(lambda: bench.phase() is Phase.RUNNING)
        assert engine.observed.port is not None
        _, client = await asyncio.open_connection("127.0.0.1", engine.observed.port)
        engine.ask_to_drain()
        await eventually(lambda: log.read_text().count("metrics\n") >= 4)
        assert bench.phase() is Phase.RUNNING
        client.close()
    assert owner.result() is None
    assert bench.left() == []


@pytest.mark.parametrize("told", [Engine.ask_to_stop, None])
async def test_draining_ends_when_it_takes_too_long_or_the_engine_must_stop_now(
    bench: Bench, told: Callable[[Engine], None] | None
) -> None:
    busy = bench.folder / "busy"
    busy.touch()
    limits = replace(QUICK, hear_s=0.01, drain_s=60 if told else 0.3)
    engine = bench.another(limits)
    async with asyncio.TaskGroup() as group:
        owner = group.create_task(engine.start(bench.plan(fake=f"busy-if={busy}"), 0))
        await eventually(lambda: bench.phase() is Phase.RUNNING)
        engine.ask_to_drain()
        if told:
            told(engine)
    assert owner.result() is None
    assert groups_by_uid(bench.folder) == {}


async def test_an_engine_that_starts_has_nothing_to_drain(bench: Bench) -> None:
    async with asyncio.TaskGroup() as group:
        owner = group.create_task(bench.engine.start(bench.plan(fake="delay=60"), 0))
        await eventually(lambda: bench.engine.observed.pid)
        bench.engine.ask_to_drain()
    assert owner.result() is None


async def test_cancelling_the_owner_lets_go_and_another_can_adopt(bench: Bench) -> None:
    async with asyncio.TaskGroup() as group:
        owner = group.create_task(bench.engine.start(bench.plan(), 3))
        await eventually(lambda: bench.phase() is Phase.RUNNING)
        owner.cancel()
    pid = bench.engine.observed.pid
    assert groups_by_uid(bench.folder) == {"u1": {pid}}
    (record,) = bench.records.all()
    assert (record.pid, record.ready) == (pid, True)
    adopter = bench.another()
    async with asyncio.TaskGroup() as group:
        owner = group.create_task(adopter.adopt(record))
        await eventually(lambda: bench.phase() is Phase.RUNNING)
        assert bench.seen[-2:] == [Phase.ADOPTED, Phase.RUNNING]
        await adopter.stop()
    assert groups_by_uid(bench.folder) == {}
    assert bench.left() == []


async def test_a_pid_that_another_process_got_since_it_was_found_is_left_alone(
    bench: Bench,
) -> None:
    plan = await bench.plan()(lambda _: None)
    assert isinstance(plan, Plan)
    # Our own pid: alive, and of another start.
    seen = {"pid": os.getpid(), "start_ticks": 1}
    async with asyncio.timeout(2):
        failure = await bench.engine.adopt(plan.record.model_copy(update=seen))
    assert failure is not None
    assert failure.trouble is Trouble.EXITED


class Watched(Records):
    """Records that remember what they were told, and whether the engine was there by then."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.told: list[tuple[int | None, bool]] = []

    def put(self, record: Record) -> None:
        super().put(record)
        self.told.append((record.pid, bool(groups_by_uid(self.home))))


async def test_a_record_is_on_disk_before_the_engine_is_there(bench: Bench) -> None:
    bench.records = records = Watched(bench.folder)
    engine = bench.another()
    async with asyncio.TaskGroup() as group:
        group.create_task(engine.start(bench.plan(), 0))
        await eventually(lambda: bench.phase() is Phase.RUNNING)
        await eventually(lambda: len(records.told) == 3)
        pid = engine.observed.pid
        await engine.stop()
    # Written before the spawn, completed after, marked when the engine answered.
    assert records.told == [(None, False), (pid, True), (pid, True)]


async def test_children_that_left_the_group_end_with_their_engine(bench: Bench) -> None:
    says = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid(); print('away', flush=True); time.sleep(60)\n"
        "time.sleep(60)"
    )
    async with asyncio.TaskGroup() as group:
        group.create_task(bench.engine.start(bench.plan(sys.executable, "-c", says), 0))
        await eventually(lambda: len(groups_by_uid(bench.folder).get("u1", ())) == 2)
        await bench.engine.stop()
        assert groups_by_uid(bench.folder) == {}


async def test_the_exit_code_of_an_engine_is_known(bench: Bench) -> None:
    failure = await bench.engine.start(bench.plan(fake="exit=7"), 0)
    assert failure is not None
    assert (failure.trouble, failure.code, failure.ran_s) == (Trouble.EXITED, 7, None)
    assert failure.sentence == "the engine exited with code 7 before it answered"


async def test_a_signal_without_a_name_is_told_by_its_number(bench: Bench) -> None:
    says = "import os, signal; os.kill(os.getpid(), signal.SIGRTMIN + 1)"
    failure = await bench.engine.start(bench.plan(sys.executable, "-c", says), 0)
    assert failure is not None
    assert re.fullmatch(r"the engine was ended by signal \d+ before it answered", failure.sentence)
    assert bench.left() == []


async def test_words_about_a_port_in_the_log_are_not_believed(bench: Bench) -> None:
    failure = await bench.engine.start(
        bench.plan(sys.executable, "-c", "exit(open('/no/Address already in use/m.gguf'))"), 0
    )
    assert failure is not None
    assert "Address already in use" in failure.last_words
    assert failure.trouble is Trouble.EXITED


async def test_what_cannot_be_written_before_the_start_is_named(bench: Bench) -> None:
    (bench.folder / "engines").write_text("not a folder")
    failure = await bench.engine.start(bench.plan(), 0)
    assert failure is not None
    assert failure.sentence == f"cannot write {bench.folder}/engines/u1.key: File exists"


async def test_a_log_that_cannot_be_written_is_named(bench: Bench) -> None:
    (bench.folder / "log").write_text("not a folder")
    failure = await bench.engine.start(bench.plan(), 0)
    assert failure is not None
    assert failure.sentence.startswith(f"cannot write {bench.folder}/log/serve/1.log: ")
    assert bench.left() == []


def _limited(folder: Path, limit: str) -> Path | None:
    """A control group of 64 MiB below `folder`, where this machine lets one be made."""
    group = folder / f"gpustack-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(64 * 2**20))
    except OSError:
        if group.exists():
            group.rmdir()
        return None
    return group


@pytest.fixture
def little_memory() -> Iterator[Path]:
    group = _limited(Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes") or _limited(
        Path("/sys/fs/cgroup"), "memory.max"
    )
    if group is None:
        pytest.skip("no control group for memory can be made here")
    yield group
    soon(lambda: not (group / "cgroup.procs").read_text(), "the group is empty")
    group.rmdir()


async def test_an_engine_that_the_kernel_ended_for_lack_of_memory_says_so(
    bench: Bench, little_memory: Path
) -> None:
    eats = "import os; open(os.environ['PROCS'], 'w').write('0'); bytearray(512 * 2**20)"
    plan = bench.plan(
        "/usr/bin/env", f"PROCS={little_memory}/cgroup.procs", sys.executable, "-c", eats
    )
    failure = await bench.engine.start(plan, 0)
    assert failure is not None
    assert failure.code == -9
    assert failure.sentence == (
        "the engine was ended by signal 9 (SIGKILL) before it answered: the kernel ended a process "
        "because memory ran out; lower the context length or the parallel requests, or give it a "
        "worker or a container with more memory"
    )


async def test_a_failure_says_what_the_log_means_before_its_last_words(bench: Bench) -> None:
    says = "error: unrecognized arguments: --nope"
    plan = bench.plan(sys.executable, "-c", f"print({says!r}); exit(2)")
    failure = await bench.engine.start(plan, 0)
    assert failure is not None
    assert failure.message.splitlines() == [
        "the engine exited with code 2 before it answered: it does not know the argument --nope; "
        "correct the model's backend parameters",
        "error: unrecognized arguments: --nope",
    ]
