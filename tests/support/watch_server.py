"""The server as a gateway sees it: watch, flush, usage, and an echo of everything else."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qs

from tests.support.openai_engine import Engine, Seen, Wire, running

Object = dict[str, Any]
CREATED = "2026-01-02T03:04:05.000Z"


def credential(id: int, secret: str, **more: Any) -> Object:
    known = {"id": id, "kind": "key", "digest": sha256(secret.encode()).hexdigest()}
    return {**known, "scopes": ["*"], "user_id": 1, **more}


def model(id: int, name: str, **more: Any) -> Object:
    shown = {"id": id, "name": name, "created_at": CREATED, "replicas": 1, "granted_to": None}
    return {**shown, **more}


def instance(id: int, model_id: int, port: int | None, **more: Any) -> Object:
    where = {"worker_id": 1, "port": port, "secret": f"secret-{id}"}
    return {"id": id, "model_id": model_id, "state": "running", **where, **more}


def worker(id: int, port: int, **more: Any) -> Object:
    return {"id": id, "name": f"w{id}", "ip": "127.0.0.1", "port": port, **more}


@dataclass
class WatchServer:
    """What the server knows and was told.

    Attributes:
        announces: changes go to the watches at once; else only a flush brings them.
        sinces: where each watch asked to resume; "": it asked for the whole list.
        usage: bodies of POST /v2/usage.
        passed: all other requests.
        usage_status: what POST /v2/usage answers.
    """

    http: Engine
    objects: dict[tuple[str, int], Object] = field(default_factory=dict)
    revision: int = 1
    epoch: str = "e"
    announces: bool = True
    history: list[tuple[int, bytes]] = field(default_factory=list)
    refuses_cursors: bool = False
    sinces: list[str] = field(default_factory=list)
    synced: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: list[bytes] = field(default_factory=list)
    watches: set[Wire] = field(default_factory=set)
    flushes: int = 0
    flushing: asyncio.Event = field(default_factory=asyncio.Event)
    usage: list[Object] = field(default_factory=list)
    usage_status: int = 204
    passed: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.synced.set()
        self.flushing.set()

    @property
    def port(self) -> int:
        return self.http.port

    def put(self, kind: str, one: Object) -> None:
        self.objects[kind, one["id"]] = one
        self._change("put", kind, one["id"], one)

    def delete(self, kind: str, id: int) -> None:
        del self.objects[kind, id]
        self._change("delete", kind, id, None)

    def _change(self, type: str, kind: str, id: int, data: Object | None) -> None:
        self.revision += 1
        self.waiting.append(self.line(type, kind=kind, id=id, data=data))
        self.history.append((self.revision, self.waiting[-1]))
        if self.announces:
            self.send_waiting()

    def line(self, type: str, **more: Any) -> bytes:
        cursor = f"{self.epoch}.{self.revision}"
        return json.dumps({"type": type, "cursor": cursor, **more}).encode() + b"\n"

    def send_waiting(self) -> None:
        lines, self.waiting = self.waiting, []
        for line in lines:
            self.tell(line)

    def tell(self, line: bytes) -> None:
        for wire in self.watches:
            wire.writer.write(b"%x\r\n%b\r\n" % (len(line), line))

    async def answer(self, seen: Seen, wire: Wire) -> None:
        path, _, query = seen.target.partition("?")
        if path == "/v2/watch":
            await self._watch(wire, parse_qs(query).get("since", [""])[0])
        elif path == "/v2/watch/flush":
            self.flushes += 1
            await self.flushing.wait()
            self.send_waiting()
            self.tell(self.line("heartbeat"))
            await wire.json({"cursor": f"{self.epoch}.{self.revision}"})
        elif path == "/v2/usage":
            if self.usage_status == 204:
                self.usage.append(json.loads(seen.body))
            await wire.raw(b"HTTP/1.1 %d X\r\ncontent-length: 0\r\n\r\n" % self.usage_status)
        else:
            self.passed.append(seen)
            await wire.json({"path": seen.target, "size": len(seen.body)})

    async def _watch(self, wire: Wire, since: str) -> None:
        self.sinces.append(since)
        if since and self.refuses_cursors:
            await wire.raw(b"HTTP/1.1 400 X\r\ncontent-length: 0\r\n\r\n")
            return
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\n"
        await wire.raw(head + b"transfer-encoding: chunked\r\n\r\n")
        epoch, _, revision = since.rpartition(".")
        if since and epoch == self.epoch:
            for changed, line in self.history:
                if changed > int(revision):
                    await wire.chunk(line)
        else:
            if since:
                await wire.chunk(self.line("resync"))
            for (kind, id), one in list(self.objects.items()):
                await wire.chunk(self.line("put", kind=kind, id=id, data=one))
        await self.synced.wait()
        await wire.chunk(self.line("synced"))
        self.waiting = []
        self.watches.add(wire)
        try:
            await asyncio.Event().wait()
        finally:
            self.watches.discard(wire)

    def records(self) -> list[Object]:
        return [record for batch in self.usage for record in batch["records"]]


@asynccontextmanager
async def watch_server() -> AsyncIterator[WatchServer]:
    async with running() as http:
        server = WatchServer(http)
        http.answer = server.answer
        yield server
