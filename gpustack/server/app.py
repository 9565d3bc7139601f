"""The control plane: one process with the API, the watches and the controllers."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from gpustack import __version__
from gpustack.config.load import from_json, with_hot
from gpustack.config.options import Settings
from gpustack.lib.locks import take_over
from gpustack.lib.role import Boot, Leave, Reload, leave
from gpustack.lib.tasks import forever
from gpustack.schemas import wire
from gpustack.schemas.users import Source
from gpustack.server import metrics
from gpustack.server.api import (
    access,
    acting,
    api_keys,
    apply,
    audit,
    auth,
    dashboard,
    docs,
    errors,
    events,
    gpu_devices,
    groups,
    instances,
    join_tokens,
    log_levels,
    model_files,
    models,
    oidc,
    probes,
    saml,
    usage,
    users,
    watch,
    worker_views,
    workers,
)
from gpustack.server.api import settings as start_options
from gpustack.server.api.agents import OwnGateway
from gpustack.server.api.browsers import telling
from gpustack.server.auth.external import Elsewhere
from gpustack.server.auth.known import Known
from gpustack.server.auth.last_uses import LastUses
from gpustack.server.auth.passwords import hash_now
from gpustack.server.auth.principals import Principal
from gpustack.server.auth.throttle import Throttle
from gpustack.server.controllers.workers import Patience
from gpustack.server.db.bootstrap import bootstrap, node_id
from gpustack.server.db.database import Database
from gpustack.server.db.embedded import database_url, embedded
from gpustack.server.db.leases import Leases
from gpustack.server.db.migrate import migrate
from gpustack.server.feed import Feed
from gpustack.server.heartbeats import SILENT_AFTER, WRITE_EVERY_S, Heartbeats
from gpustack.server.leading import Control, lead

logger = logging.getLogger(__name__)

#: Requests that are being answered when the server is told to go get this long.
GRACE_S = 3
#: An embedded database starts beside the server; after a crash it has its log to read.
EMBEDDED_START_S = 60.0


class News:
    """Who is told of a change: what was remembered of it holds no more, then all who wait for it.

    Attributes:
        known: the principals that were looked up.
        control, feed: once there is one.
    """

    def __init__(self, heartbeats: Heartbeats) -> None:
        self.known = Known[Principal]()
        self.control: Control | None = None
        self.feed: Feed | None = None
        self._heartbeats = heartbeats

    def committed(self, changed: Iterable[tuple[str, int]]) -> None:
        """This server has changed these, and has not acknowledged it yet."""
        for key in changed:
            self._forget(*key)
        if self.feed is not None:
            self.feed.committed()

    def hint(self, kind: str, row_id: int) -> None:
        """Somebody has changed this, perhaps another server."""
        self._forget(kind, row_id)
        if self.control is not None:
            self.control.hint(kind, row_id)

    def _forget(self, kind: str, row_id: int) -> None:
        if kind == wire.CREDENTIALS:
            self.known.forget()
        elif kind == wire.WORKERS:
            self._heartbeats.forget(row_id)


class Api(FastAPI):
    """The application, which says of each of its routes all that it can answer."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document; made when it is first asked for."""
        if self.openapi_schema is None:
            from gpustack.server.api.openapi import describe

            self.openapi_schema = describe(self)
        return self.openapi_schema

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Around all else, so that the answers to our own mistakes are told as well."""
        await super().__call__(scope, receive, telling(scope, send))


def create_app(
    db: Database,
    feed: Feed,
    heartbeats: Heartbeats,
    join_token: str | None,
    known: Known[Principal],
    *,
    openapi_docs: bool = True,
) -> FastAPI:
    """The API. Every route but the probes and the ways in needs a credential."""
    app = Api(
        title="gpustack", version=__version__, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.state.db, app.state.feed = db, feed
    app.state.heartbeats, app.state.join_token = heartbeats, join_token
    app.state.known, app.state.served = known, metrics.Served()
    app.state.throttle = Throttle()
    app.state.providers = {}
    errors.install(app)
    app.add_middleware(acting.Acting, db=db)
    # Not include_router: that would make every route, and match each request, a second time.
    for part in (
        probes, auth, oidc, saml, models, instances, workers, api_keys, users, watch, usage,
        log_levels, events, audit, apply, start_options, gpu_devices, dashboard, model_files,
        join_tokens, groups, access, worker_views,
    ):  # fmt: skip
        app.router.routes += part.router.routes
    if openapi_docs:
        app.router.routes += docs.router.routes
    fixed = (route.path for route in app.routes if isinstance(route, APIRoute))
    app.state.fixed_paths = frozenset(path for path in fixed if "{" not in path)
    return app


async def serve(boot: Boot) -> None:
    """Run the control plane until it is told to leave."""
    await run(boot, leave)


class ApiServer(uvicorn.Server):
    """The API over HTTP."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="httptools",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # what they say comes from the gateway, in headers of its own
                lifespan="off",
                backlog=4096,
                timeout_graceful_shutdown=GRACE_S,
                timeout_keep_alive=75,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        """Signals are the role's business, not uvicorn's."""
        yield

    async def attach(self, connection: socket.socket) -> None:
        """Answer requests that come over `connection`, which belongs to this server now.

        Raises:
            ConnectionRefusedError: it is about to end.
        """
        if self.should_exit:
            raise ConnectionRefusedError("the server ends")

        def protocol() -> asyncio.Protocol:
            return self.config.http_protocol_class(  # type: ignore[call-arg]
                config=self.config, server_state=self.server_state, app_state=self.lifespan.state
            )

        await asyncio.get_running_loop().connect_accepted_socket(protocol, connection)


async def run(
    boot: Boot,
    leave: Callable[[Reload], Awaitable[Leave]],
    *,
    started: Callable[[ApiServer], None] = lambda _: None,
    silent_after: timedelta = SILENT_AFTER,
) -> None:
    """The control plane, once it alone acts for its data directory, until `leave` returns.

    It listens at the sockets `api` and `metrics`, where `boot` has them.

    Args:
        leave: given what takes in settings that a running server may change.
        started: told when the API answers.
    """
    settings = from_json(boot.settings)
    with contextlib.ExitStack() as held:
        # In a thread: in a process that is a gateway too, requests go on meanwhile.
        await asyncio.to_thread(held.enter_context, take_over(settings.data_dir / "server.lock"))
        patience_s = EMBEDDED_START_S if embedded(settings) else 0.0
        await asyncio.to_thread(migrate, database_url(settings), patience_s=patience_s)
        plane = control_plane(settings, boot.extra, silent_after=silent_after)
        async with plane as app, asyncio.TaskGroup() as group:
            server = ApiServer(app)
            at = [boot.socket("api")] if "api" in boot.sockets else []
            group.create_task(server.serve(sockets=at))
            measured = group.create_task(_measured(boot, settings, app))
            while not server.started:  # noqa: ASYNC110  uvicorn has no event for it
                await asyncio.sleep(0)
            started(server)
            reason = await leave(lambda raw: _take_in(app, raw))
            logger.info("server leaves: %s", reason)
            app.state.feed.close()
            server.should_exit = True
            measured.cancel()


def _take_in(app: FastAPI, raw: dict[str, Any]) -> None:
    settings = app.state.settings = with_hot(app.state.settings, raw)
    app.state.patience.grace = timedelta(seconds=settings.unreachable_grace)


async def _measured(boot: Boot, settings: Settings, app: FastAPI) -> None:
    """Serve the metrics port, where there is one."""
    if "metrics" in boot.sockets:
        sock = boot.socket("metrics")
        await metrics.serve(sock, app, force_auth=settings.force_auth_localhost)


@asynccontextmanager
async def _providers(settings: Settings) -> AsyncIterator[dict[Source, Elsewhere]]:
    """The identity providers that the options name. Where there are none, nothing is imported."""
    async with contextlib.AsyncExitStack() as stack:
        found: dict[Source, Elsewhere] = {}
        if settings.oidc_issuer is not None:
            from gpustack.server.auth.oidc import provider

            found[Source.OIDC] = await stack.enter_async_context(provider(settings))
        if settings.saml_idp_server_url is not None:
            from gpustack.server.auth.saml import ServiceProvider

            found[Source.SAML] = ServiceProvider(settings)
        yield found


@asynccontextmanager
async def control_plane(
    settings: Settings, extra: Mapping[str, str], *, silent_after: timedelta = SILENT_AFTER
) -> AsyncIterator[FastAPI]:
    """Database, feed and controllers, all running; ended on the way out.

    Longer than most: what is begun here is ended here, in the opposite order.

    The database is migrated. `extra` is the launcher's: this node's own secrets.
    """
    patience = Patience(silent_after, timedelta(seconds=settings.unreachable_grace))
    heartbeats, last_uses, url = Heartbeats(), LastUses(), database_url(settings)
    news = News(heartbeats)
    db = Database(url, news.committed)
    news.control = control = Control(db, heartbeats, settings.huggingface_token, patience)
    leases = Leases(url, node_id(settings.data_dir))
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
        news.feed = feed = Feed(db, cluster.epoch, news.hint)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(feed.run()),
                group.create_task(feed.listen()),
                group.create_task(lead(leases, control.run)),
                group.create_task(
                    forever("heartbeats", lambda: heartbeats.write(db), every_s=WRITE_EVERY_S)
                ),
                group.create_task(
                    forever("last uses", lambda: last_uses.write(db), every_s=WRITE_EVERY_S)
                ),
            ]
            app = create_app(
                db,
                feed,
                heartbeats,
                extra.get("join_token"),
                news.known,
                openapi_docs=not settings.disable_openapi_docs,
            )
            app.state.settings, app.state.last_uses = settings, last_uses
            app.state.patience = patience
            app.state.gateway = OwnGateway(
                extra.get("gateway_url", ""), extra["gateway_credential"]
            )
            async with _providers(settings) as app.state.providers:
                yield app
            for task in tasks:
                task.cancel()
    finally:
        await leases.close()
        await db.close()
