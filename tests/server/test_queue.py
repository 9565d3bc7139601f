"""The queue and the loop that controllers share."""

import asyncio
from pathlib import Path

from gpustack.server.controllers import queue as queues
from gpustack.server.controllers.queue import WorkQueue
from gpustack.server.controllers.runner import run
from gpustack.server.db import tables
from gpustack.server.db.database import Database
from tests.server.conftest import Start
from tests.support.wait import eventually


async def test_a_change_during_a_run_is_run_again_and_not_at_the_same_time() -> None:
    queue: WorkQueue[int] = WorkQueue()
    runs, active = 0, 0

    class Counting:
        async def reconcile(self, key: int) -> float | None:
            nonlocal runs, active
            active += 1
            assert active == 1
            if runs == 0:
                queue.add(key)
                queue.add(key)
            await asyncio.sleep(0)
            runs += 1
            active -= 1
            return None

    queue.add(1)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(run("test", Counting(), queue))

        async def twice() -> bool:
            return runs == 2

        await eventually(twice, "the change is seen")
        task.cancel()
    assert runs == 2


async def test_a_key_has_one_appointment_however_often_it_is_looked_at() -> None:
    queue: WorkQueue[int] = WorkQueue()
    runs = 0
    seen = asyncio.Event()

    class Later:
        async def reconcile(self, key: int) -> float | None:
            nonlocal runs
            runs += 1
            if runs > 100:
                seen.set()
            return 0.05

    async with asyncio.TaskGroup() as group:
        task = group.create_task(run("test", Later(), queue))
        for _ in range(101):
            queue.add(1)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await seen.wait()
        before, start = runs, asyncio.get_running_loop().time()

        async def five_more() -> bool:
            return runs >= before + 5

        await eventually(five_more, "it is looked at again and again")
        assert asyncio.get_running_loop().time() - start > 0.2  # one chain: 50 ms each
        task.cancel()


async def test_what_no_server_lived_to_look_at_is_looked_at_after_the_next_start(
    start: Start, database_url: str, tmp_path: Path
) -> None:
    db = Database(database_url)
    async with db.write() as session:  # all that the request's transaction left, and no hint
        session.add(tables.Cluster(cluster_id="c", epoch="e", token_digest="t"))
        session.add(tables.Counter(revision=0))
        model = tables.Model(
            name="m", replicas=1, placement_strategy="spread", restart_on_error=True,
            worker_selector={},
        )  # fmt: skip
        session.add(model)
        await session.flush()
        spec = {"source": "local_path", "local_path": "/m.gguf"}
        session.add(tables.ModelVersion(model_id=model.key()[1], generation=1, spec=spec))
    await db.close()
    admin = await (await start(tmp_path)).admin()

    async def made() -> bool:
        found = (await admin.get("/v2/model-instances")).json()["items"]
        return [one["model_name"] for one in found] == ["m"]

    await eventually(made, "the model has its instance")


async def test_a_failing_key_is_retried_and_does_not_stop_the_others() -> None:
    queue: WorkQueue[int] = WorkQueue()
    seen: list[int] = []

    class Failing:
        async def reconcile(self, key: int) -> float | None:
            seen.append(key)
            if key == 1 and seen.count(1) == 1:
                raise ValueError("boom")
            return None

    assert queues.RETRY_FIRST_S <= 0.5
    queue.add(1)
    queue.add(2)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(run("test", Failing(), queue, workers=1))

        async def again() -> bool:
            return seen == [1, 2, 1]

        await eventually(again, "the failed one is tried again")
        task.cancel()
