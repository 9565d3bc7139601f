"""What watchers make of a watch: a table of all objects, kept over any number of connections."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

import httpx

from gpustack.client import Client

Rows = dict[tuple[str, int], Any]


class Table:
    """Every object of the kinds that are watched, by the events so far.

    Attributes:
        lists: how often it had to begin with a whole list.
        synced: that list was complete once.
        cursor: where a watch goes on that was cut after the last event.
    """

    def __init__(self, kinds: frozenset[str]) -> None:
        self.kinds = kinds
        self.rows: Rows = {}
        self.lists = 0
        self.synced = False
        self.cursor: str | None = None

    def take(self, type: str, kind: str | None, id: int | None, data: Any) -> None:
        match type:
            case "resync":
                self.lists += 1
                self.rows.clear()
            case "synced":
                self.synced = True
            case "put":
                self.rows[kind or "", id or 0] = data
            case "delete":
                self.rows.pop((kind or "", id or 0), None)

    async def follow(self, client: Client) -> None:
        """As agents, gateways and users' programs do it, for ever."""
        async with aclosing(client.follow(sorted(self.kinds))) as events:
            async for event in events:
                self.take(event.type, event.kind, event.id, event.data)

    async def insist(self, http: httpx.AsyncClient) -> None:
        """As a browser does it, for ever: go on from the cursor of whatever event came last."""
        while True:
            if self.cursor is None:
                self.take("resync", None, None, None)
            with suppress(httpx.TransportError):
                async for event in watched(http, self.kinds, self.cursor):
                    self.take(event["type"], event.get("kind"), event.get("id"), event.get("data"))
                    self.cursor = event["cursor"] or self.cursor
            await asyncio.sleep(0)


async def watched(
    http: httpx.AsyncClient, kinds: frozenset[str], since: str | None = None
) -> AsyncGenerator[Any, None]:
    """The events of one connection."""
    asked = {"kinds": ",".join(sorted(kinds))} | ({"since": since} if since else {})
    async with http.stream("GET", "/v2/watch", params=asked) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            yield json.loads(line)


async def listed(http: httpx.AsyncClient, kinds: frozenset[str]) -> Rows:
    """All objects as a fresh watch lists them."""
    rows: Rows = {}
    async with aclosing(watched(http, kinds)) as events:
        async for event in events:
            if event["type"] == "synced":
                break
            rows[event["kind"], event["id"]] = event["data"]
    return rows
