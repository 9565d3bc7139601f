"""Watches: what changed, to everybody who looks, without a writer ever waiting for a reader.

One task per server reads the history after each commit, loads each changed object once and puts
it into every subscription that may see it: one entry per object, the newest wins.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from sqlalchemy import func
from sqlmodel import col, select

from gpustack.schemas import wire
from gpustack.schemas.watch import EventType
from gpustack.server.db.database import Database, ReadSession, current_revision
from gpustack.server.db.tables import Change
from gpustack.server.views import Audience, Found, load

logger = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
#: Other servers write too, and tell nobody; look at least this often.
POLL_S = 5.0

Key = tuple[str, int]  # kind, id


@dataclass(eq=False)
class Subscription:
    """One watch: what it has not been sent yet.

    Attributes:
        credential_id: that opened it; it ends with that credential.
    """

    kinds: frozenset[str]
    audience: Audience
    credential_id: int | None = None
    ended: bool = False
    pending: dict[Key, tuple[int, bytes | None]] = field(default_factory=dict)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    beat: bool = False

    def put(self, key: Key, revision: int, body: bytes | None) -> None:
        """`body` None: the object is gone."""
        self.pending.pop(key, None)  # to the end: order of last change
        self.pending[key] = (revision, body)
        self.wake.set()

    def end(self) -> None:
        self.ended = True
        self.wake.set()


class Feed:
    """Hands committed changes to subscriptions and to controllers.

    Args:
        hint: called with (kind, id) of each change, for controllers.
    """

    def __init__(self, db: Database, epoch: str, hint: Callable[[str, int], None]) -> None:
        self._db = db
        self._epoch = epoch
        self._hint = hint
        self._subscriptions: set[Subscription] = set()
        self._news = asyncio.Event()
        self._advanced = asyncio.Condition()
        self._closed = False
        self.revision = 0

    def committed(self) -> None:
        self._news.set()

    def close(self) -> None:
        """End every watch: this server is about to go."""
        self._closed = True
        for subscription in self._subscriptions:
            subscription.end()

    def cursor(self, revision: int) -> str:
        return f"{self._epoch}.{revision}"

    async def run(self) -> None:
        """Read the history for ever."""
        async with self._db.read() as session:
            self.revision = await current_revision(session)
        while True:
            try:
                async with asyncio.timeout(POLL_S):
                    await self._news.wait()
            except TimeoutError:
                pass
            self._news.clear()
            await self._advance()

    async def reach(self, revision: int) -> None:
        """Return once everything up to `revision` is in the subscriptions."""
        self._news.set()
        async with self._advanced:
            await self._advanced.wait_for(lambda: self.revision >= revision)
        for subscription in self._subscriptions:
            subscription.beat = True
            subscription.wake.set()

    async def _advance(self) -> None:
        async with self._db.read() as session:
            until = await current_revision(session)
            changed = await _changes(session, self.revision)
            found: dict[Key, Found] = {}
            for kind in {kind for kind, _ in changed}:
                ids = [row_id for of, row_id in changed if of == kind]
                found |= {(kind, one.id): one for one in await load(session, kind, ids)}
        for key, revision in changed.items():
            one = found.get(key)
            self._send(key, revision, one.json if one else None)
            if key[0] == wire.CREDENTIALS and one is None:
                self._end_watches_of(key[1])
            self._hint(*key)
        async with self._advanced:
            self.revision = until
            self._advanced.notify_all()

    def _end_watches_of(self, credential_id: int) -> None:
        for subscription in self._subscriptions:
            if subscription.credential_id == credential_id:
                subscription.end()

    def _send(
        self, key: Key, revision: int, render: Callable[[Audience], bytes | None] | None
    ) -> None:
        """Each audience's bytes are made once."""
        made: dict[Audience, bytes | None] = {}
        for subscription in self._subscriptions:
            if key[0] not in subscription.kinds:
                continue
            audience = subscription.audience
            if audience not in made:
                made[audience] = _rendered(key, render, audience) if render else None
            body = made[audience]
            if body is not None or render is None:
                subscription.put(key, revision, body)

    async def watch(
        self,
        kinds: frozenset[str],
        audience: Audience,
        since: str | None = None,
        credential_id: int | None = None,
    ) -> AsyncIterator[bytes]:
        """The event stream, line by line: the list (or the changes since), synced, what follows.

        It ends with the credential that opened it, and with the server.

        Subscribes before it lists, so nothing falls between; what the list already had is
        dropped by its revision, so no object goes back in time.
        """
        subscription = Subscription(kinds, audience, credential_id, ended=self._closed)
        self._subscriptions.add(subscription)
        try:
            async with self._db.read() as session:
                listed = await current_revision(session)
                start, lines = await self._beginning(session, subscription, since)
            if since is not None and start is None:
                yield self._line(EventType.RESYNC)
            for line in lines:
                yield line
            yield self._line(EventType.SYNCED, revision=listed)
            while not subscription.ended:
                for line in self._drain(subscription, listed):
                    yield line
                try:
                    async with asyncio.timeout(HEARTBEAT_S):
                        await subscription.wake.wait()
                except TimeoutError:
                    subscription.beat = True
                subscription.wake.clear()
        finally:
            self._subscriptions.discard(subscription)

    def _drain(self, subscription: Subscription, listed: int) -> list[bytes]:
        """What is waiting. No await in between: a heartbeat's cursor covers all before it."""
        pending, subscription.pending = subscription.pending, {}
        # In order of revision. What is changed in one transaction shares one, so a watch that is
        # cut here has for sure all that came before it, and no more.
        lines = [
            self._object(key, body, cursor=self.cursor(revision - 1))
            for key, (revision, body) in pending.items()
            if revision > listed
        ]
        if subscription.beat:
            subscription.beat = False
            lines.append(self._line(EventType.HEARTBEAT, revision=max(self.revision, listed)))
        return lines

    async def _beginning(
        self, session: ReadSession, subscription: Subscription, since: str | None
    ) -> tuple[int | None, list[bytes]]:
        """Where the stream starts from (None: the history does not reach there), and its lines."""
        audience, kinds = subscription.audience, sorted(subscription.kinds)
        start = await self._resumable(session, since)
        changed = await _changes(session, start) if start is not None else {}
        lines = []
        for kind in kinds:
            ids = [row_id for of, row_id in changed if of == kind] if start is not None else None
            present = set()
            for one in await load(session, kind, ids):
                present.add(one.id)
                if (body := _rendered((kind, one.id), one.json, audience)) is not None:
                    lines.append(self._object((kind, one.id), body))
            for row_id in ids or ():
                if row_id not in present:
                    lines.append(self._object((kind, row_id), None))
        return start, lines

    async def _resumable(self, session: ReadSession, since: str | None) -> int | None:
        epoch, _, number = (since or "").partition(".")
        if epoch != self._epoch or not number.isdecimal() or len(number) > 18:
            return None
        oldest = (await session.exec(select(func.min(Change.revision)))).one()
        reaches = int(number) >= (oldest or 1) - 1
        return int(number) if reaches and int(number) <= await current_revision(session) else None

    def _object(self, key: Key, body: bytes | None, cursor: str | None = None) -> bytes:
        """One object. It has a cursor where a watch can be resumed from: not within a list."""
        event = EventType.DELETE if body is None else EventType.PUT
        head = {"type": event, "kind": key[0], "id": key[1], "cursor": cursor}
        return json.dumps(head).encode()[:-1] + b', "data": ' + (body or b"null") + b"}\n"

    def _line(self, event: EventType, *, revision: int | None = None) -> bytes:
        cursor = None if revision is None else self.cursor(revision)
        return json.dumps({"type": event, "cursor": cursor}).encode() + b"\n"


def _rendered(
    key: Key, render: Callable[[Audience], bytes | None], audience: Audience
) -> bytes | None:
    """One object's bytes; None if it must not be seen, or cannot be shown."""
    try:
        return render(audience)
    except ValueError:
        logger.exception("%s %d cannot be shown; its watchers are not told of it", *key)
        return None


async def _changes(session: ReadSession, after: int) -> dict[Key, int]:
    """What changed after a revision: each object once, in the order of its last change."""
    rows = await session.exec(
        select(Change).where(Change.revision > after).order_by(col(Change.revision))
    )
    changed: dict[Key, int] = {}
    for row in rows.all():
        changed.pop((row.kind, row.object_id), None)
        changed[row.kind, row.object_id] = row.revision
    return changed
