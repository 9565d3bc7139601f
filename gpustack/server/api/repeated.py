"""Requests that met another transaction are carried out again, and nobody notices."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response

from gpustack.errors import Contended
from gpustack.server.api.credential_first import CredentialFirst

#: How long to let the others go first, at most, before the second and the third time.
PAUSES_S = (0.05, 0.2)


class Repeated(CredentialFirst):
    """A route whose handler runs up to three times while its transaction gives way to others.

    Only that is repeated: then nothing was changed. When a connection is lost, nobody knows.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def repeated(request: Request) -> Response:
            for pause_s in PAUSES_S:
                try:
                    return await handler(request)
                except Contended:
                    await asyncio.sleep(random.uniform(0, pause_s))  # noqa: S311
            return await handler(request)

        return repeated
