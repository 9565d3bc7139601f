"""A control plane for agents to talk to: the API they use, over a real socket, without a database.

Tests change what is desired with `assign`, `change` and `remove`, and read what was reported.
"""

import asyncio
import json
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from gpustack.forward.listener import Exchange, Server, asynchronous
from gpustack.lib.secrets import new_secret
from gpustack.schemas import wire
from gpustack.schemas.instances import AssignedInstance, InstanceState, InstanceStatus, can_move
from gpustack.schemas.model_files import (
    ModelFile,
    ModelFileReport,
    ModelFileState,
    ModelFileStatus,
)
from gpustack.schemas.models import ModelSource, VersionSpec
from gpustack.schemas.workers import Heartbeat, Registration, WorkerStatus
from tests.support.wait import settled

JOIN_TOKEN = "join-token-of-the-cluster"
BEAT_S = 1.0


def assigned(id: int, spec: VersionSpec, **more: Any) -> AssignedInstance:
    """An instance as a worker is sent it."""
    now = datetime.now(UTC)
    facts: dict[str, Any] = {
        "name": f"m-{id:05d}",
        "model_id": 1,
        "model_name": "m",
        "model_generation": 1,
        "generation": 1,
        "worker_id": 1,
        "state": InstanceState.SCHEDULED,
        "secret": new_secret(),
        "created_at": now,
        "updated_at": now,
    }
    return AssignedInstance(id=id, spec=spec, **{**facts, **more})


def model_file(id: int, **more: Any) -> ModelFile:
    """A model file as a worker is sent it: asked for, and not answered yet."""
    now = datetime.now(UTC)
    facts: dict[str, Any] = {
        "source": "huggingface",
        "huggingface_repo_id": "org/one",
        "huggingface_filename": "one.gguf",
        "worker_id": 1,
        "generation": 1,
        "state": ModelFileState.DOWNLOADING,
        "created_at": now,
        "updated_at": now,
    }
    return ModelFile(id=id, **{**facts, **more})


class ControlPlane:
    """What the server knows, and what it was told.

    Attributes:
        reports: (instance id, status) in the order they came.
        files: model files by id; what the worker reports of one is shown in it.
        file_reports: (model file id, status) in the order they came.
        refuse: "METHOD /path" pattern -> HTTP status, to play a server in trouble.
        refused: requests that got an error.
        strict: whether illegal moves get 409, as the server's own table has them.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.cluster_id = "cluster-a"
        self.credential = new_secret()
        self.agent_secret = new_secret()
        self.worker_id = 1
        self.revision = 1
        self.instances: dict[int, AssignedInstance] = {}
        self.registrations: list[Registration] = []
        self.announcements: list[Registration] = []
        self.heartbeats: list[Heartbeat] = []
        self.statuses: list[WorkerStatus] = []
        self.files: dict[int, ModelFile] = {}
        self.file_reports: list[tuple[int, ModelFileStatus]] = []
        self.reports: list[tuple[int, InstanceStatus]] = []
        self.refuse: dict[str, int] = {}
        self.refused = 0
        self.strict = False
        self.watches = 0
        self._breaking = 0
        self._changes: list[dict[str, Any]] = []
        self._news = asyncio.Condition()

    # --- what tests do -------------------------------------------------------------------

    async def assign(self, instance: AssignedInstance) -> None:
        self.instances[instance.id] = instance
        await self._tell("put", instance.id)

    async def change(self, id: int, **facts: Any) -> None:
        self.instances[id] = self.instances[id].model_copy(update=facts)
        await self._tell("put", id)

    async def remove(self, id: int) -> None:
        del self.instances[id]
        await self._tell("delete", id)

    async def ask(self, file: ModelFile) -> None:
        """Want a model file, or want something else of one."""
        self.files[file.id] = file
        await self._tell("put", file.id, wire.MODEL_FILES)

    async def forget(self, id: int) -> None:
        """Delete a model file's row."""
        del self.files[id]
        await self._tell("delete", id, wire.MODEL_FILES)

    async def until_file(self, id: int, state: ModelFileState) -> ModelFileStatus:
        """The first report of `state` on a model file."""

        def found() -> ModelFileStatus | None:
            of = (status for which, status in self.file_reports if which == id)
            return next((status for status in of if status.state is state), None)

        await self.until(found)
        status = found()
        assert status is not None
        return status

    def break_watches(self) -> None:
        """Cut the connection of each watch at its next event."""
        self._breaking = self.watches

    async def until(self, true: Callable[[], Any], *, limit_s: float = 10.0) -> None:
        """Return once `true()` holds; looks after each request that came in."""
        async with asyncio.timeout(limit_s), self._news:
            await self._news.wait_for(true)

    async def until_state(
        self, id: int, state: InstanceState, *, after: int = 0, limit_s: float = 10.0
    ) -> InstanceStatus:
        """The first report of `state` among those from position `after` on."""

        def found() -> InstanceStatus | None:
            of = (status for who, status in self.reports[after:] if who == id)
            return next((status for status in of if status.state is state), None)

        await self.until(found, limit_s=limit_s)
        status = found()
        assert status is not None
        return status

    def states(self, id: int) -> list[InstanceState]:
        """The states reported of an instance, repetitions left out."""
        states = [status.state for who, status in self.reports if who == id]
        return [s for i, s in enumerate(states) if i == 0 or states[i - 1] is not s]

    # --- the API --------------------------------------------------------------------------

    async def answer(self, exchange: Exchange) -> None:
        body = json.loads(await exchange.read(1 << 20) or b"null")
        path, ok = exchange.path, True
        for pattern, status in self.refuse.items():
            if re.fullmatch(pattern, f"{exchange.method} {path}"):
                await self._refuse(exchange, status)
                return
        token = (exchange.header(b"authorization") or b"").decode().removeprefix("Bearer ")
        if path == "/v2/workers/register":
            ok = token == JOIN_TOKEN
        elif token != self.credential:
            ok = False
        if not ok:
            await self._refuse(exchange, 401)
        elif path == "/v2/watch":
            await self._watch(exchange)
        else:
            self._hear(exchange, path, body)
            async with self._news:
                self._news.notify_all()

    async def _refuse(self, exchange: Exchange, status: int) -> None:
        self.refused += 1
        _fail(exchange, status)
        async with self._news:
            self._news.notify_all()

    def _hear(self, exchange: Exchange, path: str, body: Any) -> None:
        if path == "/v2/workers/register":
            self.registrations.append(Registration.model_validate(body))
            self.credential = new_secret()
            self._registered(exchange, self.credential)
        elif path.endswith("/registration"):
            self.announcements.append(Registration.model_validate(body))
            self._registered(exchange, None)
        elif path.endswith("/heartbeat"):
            self.heartbeats.append(Heartbeat.model_validate(body))
            exchange.respond(204)
        elif path.endswith("/model-files"):
            self._new_file(exchange, ModelFileReport.model_validate(body))
        elif path.startswith("/v2/model-files/"):
            status = ModelFileStatus.model_validate(body)
            self._file_report(exchange, int(path.split("/")[3]), status)
        elif path.startswith("/v2/workers/"):
            self.statuses.append(WorkerStatus.model_validate(body))
            exchange.respond(204)
        else:
            self._report(exchange, int(path.split("/")[3]), InstanceStatus.model_validate(body))

    def _registered(self, exchange: Exchange, credential: str | None) -> None:
        answer = {
            "worker_id": self.worker_id,
            "cluster_id": self.cluster_id,
            "credential": credential,
            "agent_secret": self.agent_secret,
        }
        exchange.respond_json(200, answer)

    def _report(self, exchange: Exchange, id: int, status: InstanceStatus) -> None:
        self.reports.append((id, status))
        known = self.instances.get(id)
        if known is None:
            _fail(exchange, 404)
            return
        if self.strict and not can_move(known.state, status.state):
            _fail(exchange, 409)
            return
        if status.state is InstanceState.GONE:
            del self.instances[id]
            self._change("delete", id)
        elif not known.deleting:
            self.instances[id] = known.model_copy(update=status.model_dump())
            self._change("put", id)
        exchange.respond(204)

    def _new_file(self, exchange: Exchange, report: ModelFileReport) -> None:
        id = max(self.files, default=0) + 1
        source = {name: getattr(report, name) for name in ModelSource.model_fields}
        said = {name: getattr(report, name) for name in ModelFileStatus.model_fields}
        self.files[id] = model_file(id, **source, **said)
        self.file_reports.append((id, ModelFileStatus(**said)))
        self._change("put", id, wire.MODEL_FILES)
        exchange.respond(200, [], self.files[id].model_dump_json().encode())

    def _file_report(self, exchange: Exchange, id: int, status: ModelFileStatus) -> None:
        if id not in self.files:
            _fail(exchange, 404)
            return
        self.file_reports.append((id, status))
        if status.state is ModelFileState.GONE:
            del self.files[id]
            self._change("delete", id, wire.MODEL_FILES)
        else:
            self.files[id] = self.files[id].model_copy(update=status.model_dump())
            self._change("put", id, wire.MODEL_FILES)
        exchange.respond(204)

    async def _watch(self, exchange: Exchange) -> None:
        self.watches += 1
        number = self.watches
        exchange.endless = True
        exchange.start(200, [(b"content-type", b"application/x-ndjson")])
        since = re.search(r"since=a\.(\d+)", exchange.query)
        sent = self.revision
        if since:
            sent = int(since[1])
        else:
            for id in sorted(self.files):
                await exchange.send(_line(self._event("put", id, wire.MODEL_FILES)))
            for id in sorted(self.instances):
                await exchange.send(_line(self._event("put", id)))
        await exchange.send(_line({"type": "synced", "cursor": f"a.{sent}"}))
        token = self.credential
        while True:
            if number <= self._breaking or self.credential != token:
                exchange.abort()
                return
            for change in [c for c in self._changes if c["revision"] > sent]:
                await exchange.send(_line(change))
            sent = self.revision
            try:
                async with asyncio.timeout(BEAT_S), self._news:
                    await self._news.wait_for(lambda: self.revision > sent)  # noqa: B023
            except TimeoutError:
                await exchange.send(_line({"type": "heartbeat", "cursor": f"a.{sent}"}))

    async def _tell(self, type: str, id: int, kind: str = wire.INSTANCES) -> None:
        self._change(type, id, kind)
        async with self._news:
            self._news.notify_all()

    def _change(self, type: str, id: int, kind: str = wire.INSTANCES) -> None:
        self.revision += 1
        self._changes.append({**self._event(type, id, kind), "revision": self.revision})

    def _event(self, type: str, id: int, kind: str = wire.INSTANCES) -> dict[str, Any]:
        one = (self.files if kind == wire.MODEL_FILES else self.instances).get(id)
        return {
            "type": type,
            "kind": kind,
            "id": id,
            "cursor": f"a.{self.revision}",
            "data": json.loads(one.model_dump_json()) if one else None,
        }


def _line(event: dict[str, Any]) -> bytes:
    return json.dumps(event).encode() + b"\n"


def _fail(exchange: Exchange, status: int) -> None:
    codes = {
        401: "unauthorized",
        403: "forbidden",
        404: "not_found",
        409: "conflict",
        422: "invalid",
    }
    code = codes.get(status, "unavailable")
    exchange.respond_json(status, {"code": code, "message": f"refused: {code}", "detail": {}})


@asynccontextmanager
async def listening(
    plane: ControlPlane, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Server]:
    """`plane` answers on its port until the context ends; again in a later one."""
    async with asyncio.TaskGroup() as group:
        server = Server(asynchronous(plane.answer, group))
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", plane.port))
        await server.listen(sock, tls=tls)
        try:
            yield server
        finally:
            await settled()
            server.close()
