"""Every request has an actor, and changes that were refused are kept."""

import logging
import time
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpustack.errors import GPUStackError
from gpustack.schemas.audit import Action
from gpustack.schemas.events import ActorKind
from gpustack.server.auth.principals import SAFE_METHODS
from gpustack.server.db import audit_log
from gpustack.server.db.acting import Actor, acting, actor
from gpustack.server.db.audited import Entry
from gpustack.server.db.database import Database

logger = logging.getLogger(__name__)

#: Of refusals alike, one is kept in this time, so that nobody can fill the log with them.
AGAIN_AFTER_S = 600.0
#: So many different ones are remembered.
_REMEMBERED = 1000

_NOBODY = Actor(ActorKind.NOBODY)


class Acting:
    """Middleware: a request is nobody's until a credential is shown (`auth.principals`).

    A change that a user asks for and may not make leaves an entry in the audit log before it is
    answered, once per user and route in `AGAIN_AFTER_S`.
    """

    def __init__(self, app: ASGIApp, db: Database) -> None:
        self._app = app
        self._db = db
        self._kept_at: dict[tuple[int | None, str, str], float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def watched(message: Message) -> None:
            if message.get("status") == HTTPStatus.FORBIDDEN:
                await self._keep(scope)
            await send(message)

        with acting(_NOBODY):
            safe = scope["method"] in SAFE_METHODS
            await self._app(scope, receive, send if safe else watched)

    async def _keep(self, scope: Scope) -> None:
        who = actor()
        if who.kind is not ActorKind.USER:
            return
        method, path = str(scope["method"]), str(scope["path"])
        route = str(getattr(scope.get("route"), "path", path))
        now, alike = time.monotonic(), (who.user_id, method, route)
        if now - self._kept_at.get(alike, -AGAIN_AFTER_S) < AGAIN_AFTER_S:
            return
        if len(self._kept_at) >= _REMEMBERED:
            self._kept_at.clear()
        self._kept_at[alike] = now
        name = f"{method} {path}"
        try:
            async with self._db.write() as session:
                audit_log.add(session, Entry(Action.REFUSED, "routes", None, name))
        except GPUStackError as error:  # refused it is, with or without an entry
            logger.warning("the refusal of %s is not in the audit log: %s", name, error)
