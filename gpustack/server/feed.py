"""Watches: what changed, to everybody who looks, without a writer ever waiting for a reader.

One task per server reads the history after each commit, loads each changed object once and puts
it into every subscription that may see it: one entry per object, the newest wins.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from sqlalchemy import func
from sqlmodel import col, select

from gpustack.errors import DatabaseAway, Unavailable
from gpustack.schemas import wire
from gpustack.schemas.credentials import CredentialKind, Scope
from gpustack.schemas.watch import EventType
from gpustack.server.db import history
from gpustack.server.db.database import Database, ReadSession, current_revision
from gpustack.server.db.listening import listen
from gpustack.server.db.tables import Change
from gpustack.server.db.url import Kind
from gpustack.server.views import Audience, Found, load, load_ids, rows_for

logger = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
#: Others write too: PostgreSQL tells of it, and the command line writes into an SQLite file when no
#: server runs. Look at least this often; where nobody tells, much more often.
POLL_S = {Kind.SQLITE: 5.0, Kind.POSTGRESQL: 5.0, Kind.MYSQL: 0.5}
#: How long a change may wait for others that are told of together with it.
REST_S = 0.05
#: Watches that read their list at a time. A thousand agents come back at once when a server is
#: started anew; those that wait hold no connection to the database that others need.
BEGIN_AT_ONCE = 2
LISTEN_AGAIN_S = RETRY_S = 1.0

Key = tuple[str, int]  # kind, id


class Told(NamedTuple):
    """How an object is since a revision, as a line; or that it is not there, for these eyes."""

    revision: int
    line: bytes
    is_there: bool


@dataclass(eq=False)
class Subscription:
    """One watch: what it has not been sent yet.

    Attributes:
        credential_id: that opened it; it ends with that credential.
        by_admin: whether it is of what only administrators see; it ends when its user is none.
        shown: what it has been sent and not been told the end of, of kinds of which it is shown
            a part.
    """

    kinds: frozenset[str]
    audience: Audience
    credential_id: int | None = None
    by_admin: bool = False
    ended: bool = False
    pending: dict[Key, Told] = field(default_factory=dict)
    shown: set[Key] = field(default_factory=set)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    beat: bool = False

    def put(self, key: Key, told: Told) -> None:
        self.pending.pop(key, None)  # to the end: order of last change
        self.pending[key] = told
        self.wake.set()

    def hears_of(self, key: Key, *, is_there: bool) -> bool:
        """Whether to send how an object is now. What is not shown to it, it is not told to be gone.

        Asked when the line goes out, and not before: a list may be on its way.
        """
        if not self.audience.is_shown_part(key[0]):
            return True
        was_shown = key in self.shown
        if is_there:
            self.shown.add(key)
        else:
            self.shown.discard(key)
        return is_there or was_shown

    @property
    def is_of_part(self) -> bool:
        """Whether it is of what its user is shown a part of: it ends when that part is another."""
        return any(map(self.audience.is_shown_part, self.kinds))

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
        #: The same by what they are sent: kind -> audience -> those that get the same bytes.
        self._by_kind: dict[str, dict[Audience, set[Subscription]]] = {}
        self._news = asyncio.Event()
        self._advanced = asyncio.Condition()
        self._closed = False
        self._beginnings = asyncio.Semaphore(BEGIN_AT_ONCE)
        self._knows_where = False
        self.revision = 0

    def committed(self) -> None:
        self._news.set()

    @property
    def watches(self) -> int:
        """How many are open."""
        return len(self._subscriptions)

    def watches_of(self, audience: Audience) -> int:
        """How many of them are one audience's."""
        return sum(one.audience == audience for one in self._subscriptions)

    def close(self) -> None:
        """End every watch: this server is about to go."""
        self._closed = True
        self._end_all()

    def cursor(self, revision: int) -> str:
        return f"{self._epoch}.{revision}"

    async def run(self) -> None:
        """Read the history for ever."""
        loop = asyncio.get_running_loop()
        while not await self._begun():  # noqa: ASYNC110  the database tells nobody that it is back
            await asyncio.sleep(RETRY_S)
        while True:
            try:
                async with asyncio.timeout(POLL_S[self._db.kind]):
                    await self._news.wait()
            except TimeoutError:
                pass
            self._news.clear()
            began = loop.time()
            try:
                await self._advance()
            except Unavailable:  # the database's trouble, which says so itself
                await asyncio.sleep(RETRY_S)
                self._news.set()
            # As long as that took: when much changes, several commits are told of together.
            await asyncio.sleep(min(loop.time() - began, REST_S))

    async def _begun(self) -> bool:
        """Whether it is known from where on to read."""
        with suppress(Unavailable):
            await self._begin()
        return self._knows_where

    async def _begin(self) -> None:
        """Read from now on. Each watch sees to it before it lists, so none is before the feed."""
        if self._knows_where:
            return
        async with self._db.read() as session:
            revision = await current_revision(session)
        if not self._knows_where:
            self._knows_where, self.revision = True, revision

    async def listen(self) -> None:
        """Hear of what other servers commit, for ever, where the database tells."""
        while self._db.kind is Kind.POSTGRESQL:
            with suppress(DatabaseAway):  # then the next look is the usual one, or says so
                await listen(self._db.url, self._heard)
            await asyncio.sleep(LISTEN_AGAIN_S)

    def _heard(self, revision: int) -> None:
        if not 0 < revision <= self.revision:
            self._news.set()

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
            if until == self.revision:
                return
            is_whole = until - self.revision <= history.KEPT_REVISIONS
            changed = await _changes(session, self.revision) if is_whole else {}
            found: dict[Key, Found] = {}
            for kind in {kind for kind, _ in changed}:
                ids = [row_id for of, row_id in changed if of == kind]
                found |= {(kind, one.id): one for one in await load_ids(session, kind, ids)}
        for key, change in changed.items():
            one = found.get(key)
            self._send(key, change, one.json if one else None)
            if key[0] == wire.CREDENTIALS:
                self._end_watches_of(key[1], one)
            self._hint(*key)
        if not is_whole:  # this server was away, and others have pruned what it did not read
            self._hint(wire.CREDENTIALS, 0)  # any
            self._end_all()
        async with self._advanced:
            self.revision = until
            self._advanced.notify_all()

    def _end_all(self) -> None:
        for subscription in self._subscriptions:
            subscription.end()

    def _end_watches_of(self, credential_id: int, found: Found | None) -> None:
        """End those that the credential, as it is now, does not open, or for other eyes."""
        for subscription in self._subscriptions:
            if subscription.credential_id == credential_id and _ends_with(subscription, found):
                subscription.end()

    def _send(
        self, key: Key, change: Change, render: Callable[[Audience], bytes | None] | None
    ) -> None:
        """Each audience's bytes are made once."""
        for audience, subscriptions in self._by_kind.get(key[0], {}).items():
            if not audience.may_hear_of(change):
                continue
            body = _rendered(key, render, audience) if render else None
            if body is None and render is not None and not audience.is_shown_part(key[0]):
                continue
            # What is changed in one transaction shares one revision, so a watch that is cut here
            # has for sure all that came before it, and no more.
            line = self._object(key, body, cursor=self.cursor(change.revision - 1))
            told = Told(change.revision, line, body is not None)
            for subscription in subscriptions:
                subscription.put(key, told)

    def _open(self, subscription: Subscription) -> None:
        self._subscriptions.add(subscription)
        for kind in subscription.kinds:
            audiences = self._by_kind.setdefault(kind, {})
            audiences.setdefault(subscription.audience.of_kind(kind), set()).add(subscription)

    def _close(self, subscription: Subscription) -> None:
        self._subscriptions.discard(subscription)
        for kind in subscription.kinds:
            audiences, audience = self._by_kind[kind], subscription.audience.of_kind(kind)
            audiences[audience].discard(subscription)
            if not audiences[audience]:
                del audiences[audience]

    async def watch(
        self,
        kinds: frozenset[str],
        audience: Audience,
        since: str | None = None,
        credential_id: int | None = None,
        *,
        by_admin: bool = False,
    ) -> AsyncGenerator[bytes, None]:
        """The event stream, line by line: the list (or the changes since), synced, what follows.

        It ends with the credential that opened it, and with the server.

        Subscribes before it lists, so nothing falls between; what the list already had is
        dropped by its revision, so no object goes back in time.
        """
        subscription = Subscription(kinds, audience, credential_id, by_admin, self._closed)
        self._open(subscription)
        try:
            try:
                await self._begin()
                async with self._beginnings, self._db.read() as session:
                    if await _has_ended(session, subscription):
                        return
                    listed = await current_revision(session)
                    start, lines = await self._beginning(session, subscription, since)
            except Unavailable:  # it has begun to answer, so it can only end: they come again
                return
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
            self._close(subscription)

    def _drain(self, subscription: Subscription, listed: int) -> list[bytes]:
        """What is waiting. No await in between: a heartbeat's cursor covers all before it."""
        pending, subscription.pending = subscription.pending, {}
        # In order of revision.
        lines = [
            told.line
            for key, told in pending.items()
            if told.revision > listed and subscription.hears_of(key, is_there=told.is_there)
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
        # Nobody knows what was shown to it then: it begins anew.
        start = None if subscription.is_of_part else await self._resumable(session, since)
        changed = await _changes(session, start) if start is not None else {}
        lines = []
        for kind in kinds:
            mine = (key for key, change in changed.items() if audience.may_hear_of(change))
            gone = {row_id for of, row_id in mine if of == kind}
            if start is None:
                found = await load(session, kind, *rows_for(kind, audience))
            else:
                found = await load_ids(session, kind, gone)
            for one in found:
                gone.discard(one.id)
                if (body := _rendered((kind, one.id), one.json, audience)) is not None:
                    subscription.hears_of((kind, one.id), is_there=True)
                    lines.append(self._object((kind, one.id), body))
            lines += [self._object((kind, row_id), None) for row_id in sorted(gone)]
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


async def _changes(session: ReadSession, after: int) -> dict[Key, Change]:
    """What changed after a revision: each object once, in the order of its last change."""
    rows = await session.exec(
        select(Change).where(Change.revision > after).order_by(col(Change.revision))
    )
    changed: dict[Key, Change] = {}
    for row in rows.all():
        changed.pop((row.kind, row.object_id), None)
        changed[row.kind, row.object_id] = row
    return changed


async def _has_ended(session: ReadSession, subscription: Subscription) -> bool:
    """Whether its credential has changed since the request was let in, so that nobody ended it."""
    credential_id = subscription.credential_id
    if credential_id is None:
        return False
    found = await load_ids(session, wire.CREDENTIALS, [credential_id])
    return _ends_with(subscription, found[0] if found else None)


def _ends_with(subscription: Subscription, found: Found | None) -> bool:
    """Whether the credential, as it is now, does not open the watch, or would show another one."""
    if found is None or _is_shut(found):
        return True
    is_admin = bool(found.user and found.user.is_admin)
    if subscription.by_admin and not is_admin:
        return True
    groups = None if is_admin else found.group_ids
    return subscription.is_of_part and subscription.audience.group_ids != groups


def _is_shut(found: Found) -> bool:
    """Whether a credential, as it is now, opens no watch."""
    if found.user is not None and not found.user.is_active:
        return True
    is_key = found.row.kind == CredentialKind.KEY
    return is_key and {Scope.ALL, Scope.MANAGEMENT}.isdisjoint(found.row.scopes)
