"""Who may not ask hears that first, and nothing of what a stranger sends is kept."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from starlette.types import Message

from gpustack.errors import Unauthorized, raised
from gpustack.server.api.context import BODY_BYTES, raw_body
from gpustack.server.api.word_for_word import WordForWord


class CredentialFirst(WordForWord):
    """A route that reads a body only of those who may ask, and no more of it than BODY_BYTES.

    FastAPI alone reads the body first, however long it is. Routes that read their body themselves
    have limits of their own.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler
        checks = [
            used.call for used in self.dependant.dependencies if Unauthorized in raised(used.call)
        ]

        async def checked(request: Request) -> Response:
            for check in checks:
                await check(request)  # type: ignore[misc]
            raw = await raw_body(request, BODY_BYTES)

            async def again() -> Message:
                return {"type": "http.request", "body": raw, "more_body": False}

            return await handler(Request(request.scope, again))

        return checked
