"""The control plane: one process with the API, the watches and the controllers."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sqlmodel import col, select

from gpustack import __version__
from gpustack.config.load import from_json
from gpustack.config.options import Settings
from gpustack.lib.locks import take_over
from gpustack.lib.role import Boot, leave
from gpustack.lib.tasks import forever
from gpustack.schemas import wire
from gpustack.server.api import (
    api_keys,
    auth,
    errors,
    instances,
    models,
    probes,
    usage,
    users,
    watch,
    workers,
)
from gpustack.server.auth.passwords import hash_now
from gpustack.server.auth.principals import AnyUser
from gpustack.server.controllers import placement, runner
from gpustack.server.controllers.instances import Instances
from gpustack.server.controllers.models import Models
from gpustack.server.controllers.placement import Placements
from gpustack.server.controllers.profiles import Profiles
from gpustack.server.controllers.queue import WorkQueue
from gpustack.server.controllers.workers import Workers
from gpustack.server.db import tables
from gpustack.server.db.bootstrap import bootstrap
from gpustack.server.db.database import Database
from gpustack.server.db.history import prune
from gpustack.server.db.migrate import migrate
from gpustack.server.feed import Feed
from gpustack.server.heartbeats import WRITE_EVERY_S, Heartbeats

logger = logging.getLogger(__name__)

RELIST_S = 180.0
#: Requests that are being answered when the server is told to go get this long.
GRACE_S = 3


class Queues:
    """Which controllers look at what when an object changes."""

    def __init__(self) -> None:
        self.models, self.profiles = WorkQueue[int](), WorkQueue[int]()
        self.placement = WorkQueue[int]()
        self.instances, self.workers = WorkQueue[int](), WorkQueue[int]()

    def hint(self, kind: str, row_id: int) -> None:
        if kind == wire.MODELS:
            self.models.add(row_id)
            self.profiles.add(row_id)
        elif kind == wire.INSTANCES:
            self.instances.add(row_id)
        elif kind == wire.WORKERS:
            self.workers.add(row_id)
        if kind != wire.CREDENTIALS:
            self.placement.add(placement.ALL)

    async def relist(self, db: Database) -> None:
        """Look at everything: what a hint was lost for is seen here."""
        for kind in (wire.MODELS, wire.INSTANCES, wire.WORKERS):
            async with db.read() as session:
                ids = (await session.exec(select(col(tables.WATCHED[kind].id)))).all()
            for row_id in ids:
                self.hint(kind, row_id or 0)


def create_app(db: Database, feed: Feed, heartbeats: Heartbeats, join_token: str | None) -> FastAPI:
    """The API. Every route but the probes and the ways in needs a credential."""
    app = FastAPI(
        title="gpustack", version=__version__, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.state.db, app.state.feed = db, feed
    app.state.heartbeats, app.state.join_token = heartbeats, join_token
    errors.install(app)
    for part in (probes, auth, models, instances, workers, api_keys, users, watch, usage):
        app.include_router(part.router)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi(request: Request, user: AnyUser) -> JSONResponse:
        return JSONResponse(app.openapi())

    return app


async def serve(boot: Boot) -> None:
    """Run the control plane until it is told to leave."""
    settings = from_json(boot.settings)
    with take_over(settings.data_dir / "server.lock"):
        await asyncio.to_thread(migrate, settings.database_url.reveal())
        async with control_plane(settings, boot.extra) as app:
            server = _Server(
                uvicorn.Config(
                    app,
                    http="httptools",
                    log_config=None,
                    access_log=False,
                    server_header=False,
                    lifespan="off",
                    backlog=4096,
                    timeout_graceful_shutdown=GRACE_S,
                    timeout_keep_alive=75,
                )
            )
            async with asyncio.TaskGroup() as group:
                group.create_task(server.serve(sockets=[boot.socket("api")]))
                reason = await leave()
                logger.info("server leaves: %s", reason)
                app.state.feed.close()
                server.should_exit = True


class _Server(uvicorn.Server):
    """Signals are the role's business, not uvicorn's."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


@asynccontextmanager
async def control_plane(settings: Settings, extra: Mapping[str, str]) -> AsyncIterator[FastAPI]:
    """Database, feed and controllers, all running; ended on the way out.

    The database is migrated. `extra` is the launcher's: this node's own secrets.
    """
    queues, heartbeats = Queues(), Heartbeats()
    feeds: list[Feed] = []
    db = Database(settings.database_url.reveal(), lambda: feeds[0].committed() if feeds else None)
    try:
        cluster = await bootstrap(
            db,
            data_dir=Path(settings.data_dir),
            token=settings.token,
            password=settings.bootstrap_password,
            hash_password=hash_now,
            local_admin=extra["local_admin"],
            gateway_credential=extra["gateway_credential"],
        )
        feed = Feed(db, cluster.epoch, queues.hint)
        feeds.append(feed)
        controllers = (
            ("models", Models(db), queues.models),
            ("profiles", Profiles(db, settings.huggingface_token), queues.profiles),
            ("placement", Placements(db), queues.placement),
            ("instances", Instances(db), queues.instances),
            ("workers", Workers(db, heartbeats), queues.workers),
        )
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(feed.run())]
            for name, controller, queue in controllers:
                tasks.append(group.create_task(runner.run(name, controller, queue)))
            for name, step, every_s in (
                ("relist", lambda: queues.relist(db), RELIST_S),
                ("heartbeats", lambda: heartbeats.write(db), WRITE_EVERY_S),
                ("history", lambda: prune(db), RELIST_S),
            ):
                tasks.append(group.create_task(forever(name, step, every_s=every_s)))
            yield create_app(db, feed, heartbeats, extra.get("join_token"))
            for task in tasks:
                task.cancel()
    finally:
        await db.close()
