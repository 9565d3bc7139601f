"""What a browser that was sent here reads when it cannot go on."""

from collections.abc import Callable, Coroutine
from html import escape
from typing import Any, Final

from fastapi import Request, Response
from fastapi.responses import HTMLResponse

from gpustack.errors import GPUStackError
from gpustack.server.api.word_for_word import WordForWord

_PAGE: Final = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>gpustack</title>
<p>{}</p>
<p><a href="/">Back to gpustack</a></p>
</html>
"""


class Navigated(WordForWord):
    """A route that browsers are sent to. To those that want a page, an error is one sentence on it;
    to all others, JSON as everywhere.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def shown(request: Request) -> Response:
            try:
                return await handler(request)
            except GPUStackError as error:
                if "text/html" not in request.headers.get("accept", ""):
                    raise
                return HTMLResponse(_PAGE.format(escape(str(error))), error.status)

        return shown
