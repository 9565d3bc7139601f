"""Many who write into one SQLite file at once, in this process and in others."""

import asyncio
import sys
import time
from pathlib import Path

import pytest
from sqlmodel import func, select

from gpustack.server.db.audit_log import verify
from gpustack.server.db.database import Database, current_revision, get
from gpustack.server.db.migrate import migrate
from gpustack.server.db.tables import Counter, Model, User

WRITERS = 64

#: Another process: what commands write and read while no server runs, again and again until its
#: standard input ends. Says how often, and the longest that one of them took.
COMMANDS = """
import asyncio, sys, threading, time
from gpustack.cli.audit import _verified
from gpustack.cli.reset_admin_password import _replace
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
count, longest = 0, 0.0
print(flush=True)
while not ended.is_set():
    begun = time.monotonic()
    asyncio.run(_replace(sys.argv[1], f"hash {count}"))
    found = asyncio.run(_verified(sys.argv[1]))
    assert found.problem is None, found
    longest, count = max(longest, time.monotonic() - begun), count + 1
print(count, longest)
"""


@pytest.mark.parametrize(
    "seconds", [3, pytest.param(60, marks=[pytest.mark.soak, pytest.mark.timeout(300)])]
)
async def test_64_writers_and_the_command_line_never_meet_a_database_that_is_locked(
    tmp_path: Path, seconds: int
) -> None:
    url = f"sqlite:///{tmp_path / 'database.db'}"
    await asyncio.to_thread(migrate, url)
    db = Database(url)
    async with db.write() as session:
        session.add(Counter(revision=0))
        session.add(User(username="admin", password_hash="hash", is_admin=True))
        session.add_all(
            Model(
                name=f"m{number}", replicas=0, placement_strategy="spread", worker_selector={},
                restart_on_error=True,
            )
            for number in range(WRITERS)
        )  # fmt: skip
    async with db.read() as reader:
        first = await current_revision(reader)
    commands = await asyncio.create_subprocess_exec(
        sys.executable, "-c", COMMANDS, url,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert commands.stdout
    await commands.stdout.readline()
    end = time.monotonic() + seconds

    async def write(model_id: int) -> list[float]:
        """How long each of its writes took."""
        took = []
        while (begun := time.monotonic()) < end:
            async with db.write() as session:
                (await get(session, Model, model_id)).replicas += 1
            took.append(time.monotonic() - begun)
        return took

    async def read() -> int:
        count = 0
        while time.monotonic() < end:
            async with db.read() as session:
                await session.exec(select(func.sum(Model.replicas)))
            count += 1
        return count

    async with asyncio.TaskGroup() as group:  # fails with whatever one of them meets
        writers = [group.create_task(write(number + 1)) for number in range(WRITERS)]
        reading = group.create_task(read())
    said, _ = await commands.communicate(b"")
    assert commands.returncode == 0
    count, longest = said.split()

    writes = [writer.result() for writer in writers]
    total = sum(map(len, writes))
    async with db.read() as reader:
        assert (await reader.exec(select(func.sum(Model.replicas)))).one() == total
        assert await current_revision(reader) == first + total
        assert (await verify(reader)).entries == int(count)
    await db.close()
    assert min(map(len, writes)) > 0
    assert int(count) > 0
    sys.stdout.write(  # shown by pytest -rP
        f"{seconds} s: {total} writes of {WRITERS} writers ({total / seconds:.0f} per s, "
        f"{min(map(len, writes))} to {max(map(len, writes))} each, the longest "
        f"{max(map(max, writes)):.2f} s), {reading.result()} reads, {int(count)} resets of the "
        f"password by another process (the longest {float(longest):.2f} s)\n"
    )
