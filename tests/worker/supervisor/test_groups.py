import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpustack.lib import platform
from gpustack.worker.supervisor.groups import end_group, groups_by_uid
from gpustack.worker.supervisor.records import HOME_VARIABLE, UID_VARIABLE

STUBBORN = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0 and os.fork() == 0:
    time.sleep(60)
print("ready", flush=True)
time.sleep(60)
"""


def started(code: str, **marks: str) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, **marks},
        start_new_session=True,
    )
    assert process.stdout
    process.stdout.readline()
    return process


async def test_a_group_that_ignores_being_asked_is_made_to_end() -> None:
    leader = await asyncio.to_thread(started, STUBBORN)
    began = time.monotonic()
    await end_group(leader.pid, limit_s=0.2, reap=leader.poll)
    assert 0.2 <= time.monotonic() - began < 2
    assert not platform.group_alive(leader.pid)
    assert leader.returncode == -signal.SIGKILL
    assert leader.stdout
    leader.stdout.close()


async def test_a_group_that_is_gone_already_is_no_wait() -> None:
    leader = await asyncio.to_thread(started, "print()")
    await asyncio.to_thread(leader.wait)
    async with asyncio.timeout(1):
        await end_group(leader.pid, limit_s=60)
    assert leader.stdout
    leader.stdout.close()


async def test_groups_are_known_by_what_their_environment_says(tmp_path: Path) -> None:
    code = "import time; print(flush=True); time.sleep(60)"
    marks = {UID_VARIABLE: "u1", HOME_VARIABLE: str(tmp_path)}
    ours = await asyncio.to_thread(lambda: started(code, **marks))
    other = await asyncio.to_thread(lambda: started(code, **{**marks, HOME_VARIABLE: "/other"}))
    try:
        assert groups_by_uid(tmp_path) == {"u1": {ours.pid}}
    finally:
        for process in (ours, other):
            await end_group(process.pid, limit_s=1, reap=process.poll)
            assert process.stdout
            process.stdout.close()
