import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

from gpustack.worker.agent import only_agent

HOLD = """
import asyncio, signal, sys
from pathlib import Path
from gpustack.worker.agent import only_agent

async def main():
    async with only_agent(Path(sys.argv[1])):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("held", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def holder(data_dir: Path) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLD, str(data_dir), stdout=PIPE
    )
    assert process.stdout
    assert await process.stdout.readline() == b"held\n"
    return process


async def test_an_agent_that_hangs_is_killed_by_its_successor(tmp_path: Path) -> None:
    hung = await holder(tmp_path)
    async with only_agent(tmp_path, patience_s=0.2):
        assert await hung.wait() == -signal.SIGKILL
        assert (tmp_path / "agent.lock").read_text() == f"{os.getpid()}\n"


async def test_a_successor_waits_for_an_agent_that_leaves(tmp_path: Path) -> None:
    leaving = await holder(tmp_path)
    entered = asyncio.Event()

    async def succeed() -> None:
        async with only_agent(tmp_path, patience_s=10):
            entered.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(succeed())
        await asyncio.sleep(0.1)
        assert not entered.is_set()
        leaving.kill()
        await leaving.wait()
        async with asyncio.timeout(1):
            await entered.wait()
