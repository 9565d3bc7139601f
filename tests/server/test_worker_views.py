"""Logs and engines as the server shows them: by the real API of an agent."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from gpustack.forward.metrics import Metric
from gpustack.schemas.engines import Engine, Engines
from gpustack.server.api import worker_views
from gpustack.worker import log_times
from gpustack.worker.api import Api
from gpustack.worker.supervisor.engine_log import log_path, start_log
from tests.server.conftest import JOIN, FakeAgent, Plane, registration
from tests.support.wait import eventually


@dataclass
class Stage:
    """A worker with an agent's API, and an instance of it."""

    admin: httpx.AsyncClient
    agent: FakeAgent
    log_dir: Path
    instance: dict[str, Any]

    @property
    def path(self) -> str:
        return f"/v2/model-instances/{self.instance['id']}/logs"

    @property
    def log(self) -> Path:
        return log_path(self.log_dir, self.instance["id"])

    def write(self, text: str) -> None:
        """A run of the engine, which says this."""
        fd = start_log(self.log)
        os.write(fd, text.encode())
        os.close(fd)


async def no_metrics() -> list[Metric]:
    return []


async def engines() -> Engines:
    return Engines([Engine(instance_id=3, instance_name="m-abcde", phase="running", age_s=1.5)])


@asynccontextmanager
async def staged(
    plane: Plane, name: str = "org/m:1", *, listens: bool = True
) -> AsyncIterator[Stage]:
    admin, joiner = await plane.admin(), await plane.client(JOIN)
    sock = socket.create_server(("127.0.0.1", 0))
    body = registration("w", port=sock.getsockname()[1])
    said = (await joiner.post("/v2/workers/register", json=body)).json()
    agent = FakeAgent(said["worker_id"], await plane.client(said["credential"]), said)
    await agent.report()
    spec = {"name": name, "source": "local_path", "local_path": "/m.gguf"}
    assert (await admin.post("/v2/models", json=spec)).status_code == 201

    async def placed() -> Any:
        (found,) = (await admin.get("/v2/model-instances")).json()["items"] or [{}]
        return found if found.get("worker_id") else None

    instance = await eventually(placed, "it is placed")
    with closing(sock):
        async with asyncio.TaskGroup() as group:
            api = Api(
                log_dir=plane.data_dir / "worker",
                secret=lambda: said["agent_secret"],
                instances=lambda: {instance["id"]},
                engines=engines,
                metrics=no_metrics,
            )
            task = group.create_task(api.serve(sock) if listens else asyncio.sleep(3600))
            yield Stage(admin, agent, plane.data_dir / "worker", instance)
            task.cancel()


async def test_a_log_is_asked_for_by_lines_time_and_run(plane: Plane) -> None:
    async with staged(plane) as stage:
        stage.write("before\n")
        lines = [f"{n}\n" for n in range(1200)]
        stage.write("".join(lines))
        then = sum(map(len, lines[:1100]))
        log_times.note(stage.log, time.time() - 600, then)
        at = datetime.now(UTC) - timedelta(minutes=9)
        for asked, text in (
            ({}, lines[-1000:]),
            ({"tail": "3"}, lines[-3:]),
            ({"tail": "-1"}, lines),
            ({"since": "9m"}, lines[1100:]),
            ({"since": "540"}, lines[1100:]),
            ({"since": "20m"}, lines),
            ({"since": "20m", "tail": "2"}, lines[-2:]),
            ({"since": at.isoformat()}, lines[1100:]),
            ({"since": str(int(at.timestamp()))}, lines[1100:]),
            ({"since": (at + timedelta(hours=2)).astimezone().isoformat()}, lines[1100:]),
            ({"previous": "true"}, ["before\n"]),
            ({"previous": "1", "follow": "true"}, ["before\n"]),
            ({"download": "true"}, lines),
        ):
            answer = await stage.admin.get(stage.path, params=asked)
            assert (answer.status_code, answer.text) == (200, "".join(text)), asked
            assert answer.headers["x-accel-buffering"] == "no"
        for wrong in (
            {"tail": "-2"}, {"since": "an hour"}, {"since": "2026-01-01T00:00:00"},
            {"since": "-5m"}, {"previous": "-1"}, {"previous": "yes?"},
        ):  # fmt: skip
            assert (await stage.admin.get(stage.path, params=wrong)).status_code == 422, wrong
        for wrong, said in (
            ({"since": "an hour"}, "since: want a time such as 2026-01-31T12:00:00Z or a duration "
                                   "such as 10m, got 'an hour'"),
            ({"previous": "x" * 99}, "previous: want true, false or how many runs back, got '"
                                     + "x" * 40 + "'"),
        ):  # fmt: skip
            assert (await stage.admin.get(stage.path, params=wrong)).json()["message"] == said


async def test_a_downloaded_log_has_a_name_that_every_system_takes(plane: Plane) -> None:
    async with staged(plane, "../Org/m:1") as stage:
        stage.write("one")
        stage.write("two")
        name = "Org-m-1-" + stage.instance["name"][-5:]
        for more, ending in (("", ""), ("&previous=true", ".previous-1")):
            answer = await stage.admin.get(f"{stage.path}?download=true{more}")
            said = answer.headers["content-disposition"]
            assert said == f'attachment; filename="{name}{ending}.log"'
        assert "content-disposition" not in (await stage.admin.get(stage.path)).headers


async def test_why_there_is_no_log_is_said(plane: Plane) -> None:
    async with staged(plane, "m") as stage:
        name = stage.instance["name"]

        async def said(path: str = "") -> tuple[int, str]:
            answer = await stage.admin.get(path or stage.path)
            return answer.status_code, answer.json()["message"]

        why = f"instance {name} has no log yet: its engine has not been started, it is "
        assert await said() == (404, why + "scheduled")
        await stage.agent.say(stage.instance["id"], "downloading")
        assert await said() == (404, why + "downloading")
        await stage.agent.say(stage.instance["id"], "error", state_message="no port is free\nx")
        assert await said() == (404, f"instance {name} has no log yet: no port is free")
        await stage.agent.say(stage.instance["id"], "starting")
        gone = f"worker w: instance {stage.instance['id']} has no log on this worker"
        assert await said() == (404, gone)  # somebody has removed it
        stage.write("one")
        status, message = await said(stage.path + "?previous=true")
        assert (status, message) == (
            404,
            f"worker w: instance {stage.instance['id']} has no previous log on this worker",
        )
        status, message = await said(stage.path + "?previous=2")
        assert (status, "has no previous log" in message) == (404, True)
        assert (await said("/v2/model-instances/99/logs"))[0] == 404
    status, message = await said()  # now nobody answers there
    assert (status, message.startswith("worker w cannot be reached")) == (503, True)


@pytest.mark.parametrize("follow", ["true", "false"])
async def test_a_worker_that_hangs_keeps_nobody_waiting(
    plane: Plane, monkeypatch: pytest.MonkeyPatch, follow: str
) -> None:
    monkeypatch.setattr(worker_views, "BEGINS_S", 0.3)
    async with staged(plane, listens=False) as stage:
        async with asyncio.timeout(20):
            answer = await stage.admin.get(stage.path, params={"follow": follow})
        assert answer.status_code == 503
        assert "it has not begun to answer within 0.3 s" in answer.json()["message"]


async def test_what_runs_on_a_worker_is_what_its_agent_says(plane: Plane) -> None:
    async with staged(plane) as stage:
        answer = await stage.admin.get(f"/v2/workers/{stage.agent.id}/engines")
        assert answer.json() == [one.model_dump() for one in (await engines()).root]
        assert (await stage.admin.get("/v2/workers/99/engines")).status_code == 404
