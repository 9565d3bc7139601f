"""Drains, silence, rolls and all else in any order, over the real API, database and controllers.

What the plan decides has tests of its own (test_models_drained_and_lost); here the facts that it
rests on are read from rows, and workers find out by themselves what was decided meanwhile.
`GPUSTACK_TEST_SEED` makes a storm of its own.
"""

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from sqlmodel import col, update

from gpustack.server.controllers import models, placement
from gpustack.server.db import tables
from gpustack.server.db.workers import set_silent
from tests.server.conftest import FakeAgent, Plane, registration
from tests.server.test_models_roll import MODEL, ONE
from tests.support.wait import eventually

LONG_AGO = datetime(2026, 1, 2, 12, 3, tzinfo=UTC)
STEPS = 40
#: What fits on each worker: less than all models want at times.
PLACES = (4, 2, 2)


@dataclass
class Host:
    """A worker's machine: its agent, and the engines there by instance, each with its state."""

    agent: FakeAgent
    name: str
    here: bool = True
    broken: bool = False
    engines: dict[int, str] = field(default_factory=dict)

    async def step(self) -> None:
        """What an agent does when it looks: it ends, starts and tells."""
        if not self.here:
            return
        listed = {
            one["id"]: one
            for one in (await self.agent.http.get("/v2/model-instances")).json()["items"]
        }
        for id in self.engines.keys() - listed.keys():  # the server knows nothing of it
            del self.engines[id]
        for id, one in listed.items():
            if not self.here:
                return
            if one["state"] == "stopping":
                self.engines.pop(id, None)
                await self.agent.say(id, "gone")
                continue
            engine = self.engines.get(id, "scheduled")
            if engine == "scheduled":
                self.engines[id] = "starting"
            elif self.broken:
                self.engines[id] = "error" if engine == "starting" else engine
            elif engine != "running":
                self.engines[id] = "running" if engine == "starting" else "starting"
            if one["state"] != self.engines[id]:
                await self.agent.say(id, self.engines[id])


@dataclass
class Storm:
    plane: Plane
    admin: httpx.AsyncClient
    random: random.Random
    hosts: list[Host] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        over = asyncio.Event()

        async def work() -> None:
            while not over.is_set():
                for host in self.hosts:
                    await host.step()
                await asyncio.sleep(0.005)

        async with asyncio.TaskGroup() as group:
            group.create_task(work())
            yield
            over.set()

    async def join(self, name: str, places: int) -> None:
        agent = await self.plane.worker(name, memory_total_bytes=places * ONE)
        self.hosts.append(Host(agent, name))

    async def models(self) -> list[dict[str, Any]]:
        return list((await self.admin.get("/v2/models")).json()["items"])

    async def instances(self) -> list[dict[str, Any]]:
        return list((await self.admin.get("/v2/model-instances")).json()["items"])

    # --- what happens ------------------------------------------------------------------------

    async def schedule(self, host: Host, how: str) -> None:
        json: dict[str, Any] | None = None if how == "uncordon" else {}
        answer = await self.admin.post(f"/v2/workers/{host.agent.id}/{how}", json=json)
        assert answer.status_code == 200, answer.text

    async def away(self, host: Host, *, lost: bool) -> None:
        host.here = False
        self.plane.app.state.heartbeats._heard.pop(host.agent.id, None)
        async with self.plane.db.write() as session:
            its = update(tables.Worker).where(col(tables.Worker.id) == host.agent.id)
            await session.exec(its.values(heartbeat_at=LONG_AGO))
            worker = await session.get_one(tables.Worker, host.agent.id)
            end = None if lost else datetime.now(UTC) + timedelta(minutes=5)
            await set_silent(session, worker, silent=True, lost=lost, grace_ends_at=end)

    async def back(self, host: Host) -> None:
        path = f"/v2/workers/{host.agent.id}/registration"
        answer = await host.agent.http.put(path, json=registration(host.name))
        assert answer.status_code == 200, answer.text
        host.here = True

    async def replace(self, host: Host) -> None:
        """The worker is deleted, and its machine joins anew."""
        await self.admin.delete(f"/v2/workers/{host.agent.id}")
        self.hosts.remove(host)
        await self.join(f"{host.name}x", PLACES[int(host.name[1]) - 1])

    async def happen(self) -> None:
        host, model = self.random.choice(self.hosts), self.random.choice(await self.models())
        path = f"/v2/models/{model['id']}"
        what = self.random.choice(
            ("drain",) * 3 + ("away",) * 2 + ("lose",) * 3 + ("back",) * 4
            + ("uncordon", "cordon", "reboot", "break", "mend", "mend", "replace", "scale", "scale",
               "roll", "roll", "rollback", "kill one")
        )  # fmt: skip
        self.told.append(f"{what} {host.name} {model['name']}")
        match what:
            case "drain" | "cordon" | "uncordon":
                await self.schedule(host, what)
            case "away" | "lose":
                await self.away(host, lost=what == "lose")
            case "back":
                await self.back(host)
            case "reboot":
                host.engines.clear()
            case "break" | "mend":
                host.broken = what == "break"
            case "replace":
                await self.replace(host)
            case "scale":
                answer = await self.admin.patch(path, json={"replicas": self.random.randint(0, 3)})
                assert answer.status_code == 200
            case "roll":
                env = {"A": str(self.random.randint(1, 9))}
                assert (await self.admin.patch(path, json={"env": env})).status_code == 200
            case "rollback":
                await self.admin.post(f"{path}/rollback", json={})
            case _:
                if its := await self.instances():
                    one = self.random.choice(its)
                    await self.admin.delete(f"/v2/model-instances/{one['id']}")

    # --- how it ends -------------------------------------------------------------------------

    async def rest(self) -> bool:
        """As many as there should be run, of the wanted version, and nothing else is anywhere."""
        models, instances = await self.models(), await self.instances()
        return (
            all(one["rollout"]["state"] == "done" for one in models)
            and len(instances) == sum(one["replicas"] for one in models)
            and all(one["state"] == "running" and not one["replaced_by"] for one in instances)
            and {i for host in self.hosts for i in host.engines} == {i["id"] for i in instances}
        )

    async def settled(self, what: str) -> None:
        try:
            await eventually(self.rest, what, within_s=40)
        except AssertionError as error:
            shown = [
                {key: one[key] for key in ("id", "model_name", "model_generation", "state",
                 "worker_id", "replaced_by", "state_message", "reasons", "deleting")}
                for one in await self.instances()
            ]  # fmt: skip
            states = [(m["name"], m["replicas"], m["rollout"]) for m in await self.models()]
            raise AssertionError(f"{error}\n{self.told}\n{states}\n{shown}\n{self.hosts}") from None


@pytest.mark.slow
async def test_after_a_storm_all_is_as_it_should_be(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "LOOK_AGAIN_S", 0.3)
    monkeypatch.setattr(placement, "AGAIN_S", 0.3)
    storm = Storm(
        plane, await plane.admin(), random.Random(os.environ.get("GPUSTACK_TEST_SEED", "1"))
    )
    for number, places in enumerate(PLACES, start=1):
        await storm.join(f"w{number}", places)
    async with storm.working():
        for name in ("a", "b"):
            answer = await storm.admin.post("/v2/models", json=MODEL | {"name": name})
            assert answer.status_code == 201
        await storm.settled("both models run")
        for _ in range(STEPS):
            await storm.happen()
            await asyncio.sleep(storm.random.choice((0, 0, 0.05, 0.3)))
        for host in storm.hosts:
            host.broken = False
            await storm.back(host)
            await storm.schedule(host, "uncordon")
        for one in await storm.models():
            await storm.admin.patch(f"/v2/models/{one['id']}", json={"replicas": 2})
        await storm.settled("all is well again")
        drained = storm.hosts[0]
        await storm.schedule(drained, "drain")

        async def is_drained() -> bool:
            found = await storm.admin.get(f"/v2/workers/{drained.agent.id}")
            return not found.json()["leaving"]

        await eventually(is_drained, "the rest has room for all", within_s=40)
        await storm.settled("all goes on elsewhere")
