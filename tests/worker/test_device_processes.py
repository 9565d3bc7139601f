import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpustack.lib import platform
from gpustack.worker.device_processes import owners
from gpustack.worker.supervisor.records import Record, Records
from tests.support.wait import soon

#: What an engine may be: a leader, a child in its group, a part in a session of its own.
ENGINE = """
import os, subprocess, sys, time
argv = [sys.executable, "-c", "import time; time.sleep(60)"]
inside, outside = subprocess.Popen(argv), subprocess.Popen(argv, start_new_session=True)
print(os.getpid(), inside.pid, outside.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def records(tmp_path: Path) -> Records:
    (tmp_path / "engines").mkdir()
    return Records(tmp_path)


def record(records: Records, pid: int | None, instance_id: int = 7) -> Record:
    """Of an engine that was spawned as `pid`."""
    return Record(
        uid=f"uid-{instance_id}", instance_id=instance_id, instance_name="m-abcde", generation=1,
        port=1, secret_file="", log_file="", argv=[], health_path="/health",
        boot_id=platform.boot_id(), pid=pid,
        start_ticks=None if pid is None else platform.start_ticks(pid),
    )  # fmt: skip


@pytest.fixture
def engine(records: Records) -> Iterator[list[int]]:
    """Pids of an engine of instance 7, spawned with its mark."""
    process = subprocess.Popen(
        [sys.executable, "-c", ENGINE],
        env=os.environ | records.environment("uid-7"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert process.stdout
    pids = [int(pid) for pid in process.stdout.readline().split()]
    yield pids
    for pid in pids:
        os.kill(pid, 9)
    process.wait()
    process.stdout.close()


def test_every_process_of_an_engine_is_its_instances(records: Records, engine: list[int]) -> None:
    records.put(record(records, engine[0]))
    records.put(record(records, None, instance_id=8))
    nobodys = [os.getpid(), 1, 1 << 22]
    soon(
        lambda: owners(records, [*engine, *nobodys], sees_all=True) == dict.fromkeys(engine, 7),
        "the engine's processes are known",
    )


def test_a_pid_that_another_process_got_is_not_the_engines(
    records: Records, engine: list[int]
) -> None:
    stale = record(records, engine[0]).model_copy(update={"uid": "other", "start_ticks": 1})
    records.put(stale)
    assert owners(records, engine, sees_all=True) == {}


def test_in_a_container_a_number_without_a_device_open_is_nobodys(
    records: Records, engine: list[int]
) -> None:
    records.put(record(records, engine[0]))
    assert owners(records, engine, sees_all=False) == {}
    found = owners(records, engine[:1], sees_all=False, nodes=("/dev/null",))
    assert found == {engine[0]: 7}


def test_what_a_process_has_open_is_known(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        assert str(tmp_path / "file") in platform.open_files(os.getpid())
        assert not file.closed
    assert str(tmp_path / "file") not in platform.open_files(os.getpid())
    assert platform.open_files(1 << 22) == []
