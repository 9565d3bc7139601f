"""A real control plane on a real database, called in process.

Every test that touches a database runs on each kind of it. SQLite is for `make test`; the others
would make that too long, and carry the mark slow.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from gpustack.config.load import load
from gpustack.schemas import wire
from gpustack.server.app import control_plane
from gpustack.server.db.database import Database
from gpustack.server.feed import Feed
from tests.support.databases import KINDS, Databases

GATEWAY, LOCAL_ADMIN, JOIN = "gateway-secret", "local-admin-secret", "join-secret"
PASSWORD = "Bootstrap-1"


@dataclass
class Plane:
    """A running control plane, and clients of it that show one credential each."""

    app: FastAPI
    data_dir: Path
    stack: AsyncExitStack
    made: dict[str, httpx.AsyncClient] = field(default_factory=dict)

    @property
    def db(self) -> Database:
        db: Database = self.app.state.db
        return db

    @property
    def feed(self) -> Feed:
        feed: Feed = self.app.state.feed
        return feed

    async def client(self, secret: str | None = None, **headers: str) -> httpx.AsyncClient:
        shown = {"Authorization": f"Bearer {secret}"} if secret else {}
        return await self.stack.enter_async_context(
            httpx.AsyncClient(
                transport=httpx.ASGITransport(self.app),
                base_url="http://test",
                headers=shown | headers,
            )
        )

    async def admin(self) -> httpx.AsyncClient:
        return await self.client(LOCAL_ADMIN)

    async def gateway(self) -> httpx.AsyncClient:
        return await self.client(GATEWAY)

    async def through_gateway(self, **headers: str) -> httpx.AsyncClient:
        """As a browser's requests come: passed on by a gateway."""
        return await self.client(None, **{wire.GATEWAY_HEADER: GATEWAY} | headers)

    async def worker(self, name: str = "w1", **facts: Any) -> "FakeAgent":
        """A worker that has registered and reported what it has."""
        joiner = await self.client(JOIN)
        answer = await joiner.post("/v2/workers/register", json=registration(name))
        answer.raise_for_status()
        body = answer.json()
        agent = FakeAgent(body["worker_id"], await self.client(body["credential"]), body)
        await agent.report(**facts)
        return agent


@dataclass
class FakeAgent:
    """A worker's side of the API, spoken by a test."""

    id: int
    http: httpx.AsyncClient
    registered: dict[str, Any]

    async def report(self, **facts: Any) -> None:
        status = {
            "os": "linux",
            "arch": "x86_64",
            "cpu_count": 2,
            "memory_total_bytes": 16 * 1024**3,
        }
        answer = await self.http.put(f"/v2/workers/{self.id}/status", json=status | facts)
        assert answer.status_code == 204, answer.text

    async def say(self, instance_id: int, state: str, **more: Any) -> httpx.Response:
        return await self.http.put(
            f"/v2/model-instances/{instance_id}/status", json={"state": state, **more}
        )


def registration(name: str = "w1", **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "machine_id": f"machine-{name}",
        "boot_id": "boot",
        "run_id": "run",
        "ip": "127.0.0.1",
        "port": 10150,
    } | more


Start = Callable[..., Awaitable[Plane]]


@pytest.fixture(
    scope="session",
    params=[
        kind if kind == "sqlite" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS
    ],
)
def databases(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Databases]:
    """Each kind of database."""
    kind: str = request.param
    with KINDS[kind](tmp_path_factory.mktemp(kind)) as made:
        yield made


@pytest.fixture
async def empty_url(databases: Databases, tmp_path: Path) -> AsyncIterator[str]:
    """A database without a table."""
    url = await databases.empty(tmp_path)
    yield url
    await databases.drop(url)


@pytest.fixture
async def database_url(databases: Databases, tmp_path: Path) -> AsyncIterator[str]:
    """A database with the newest schema."""
    url = await databases.migrated(tmp_path)
    yield url
    await databases.drop(url)


@pytest.fixture
async def start(database_url: str) -> AsyncIterator[Start]:
    """Start a control plane on a data directory; all are ended after the test.

    Those of one test have one database, unless an option says otherwise.
    """
    async with AsyncExitStack() as stack:

        async def begin(data_dir: Path, **options: str) -> Plane:
            settings = load(
                {
                    "data_dir": str(data_dir),
                    "bootstrap_password": PASSWORD,
                    "database_url": database_url,
                }
                | options,
                {},
            ).settings
            extra = {
                "gateway_credential": GATEWAY,
                "local_admin": LOCAL_ADMIN,
                "join_token": JOIN,
            }
            app = await stack.enter_async_context(control_plane(settings, extra))
            return Plane(app, data_dir, stack)

        yield begin


@pytest.fixture
async def plane(start: Start, tmp_path: Path) -> Plane:
    return await start(tmp_path)
