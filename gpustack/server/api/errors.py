"""The only place where an exception becomes an HTTP response."""

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from gpustack.errors import GPUStackError, Unavailable
from gpustack.schemas.errors import Error

logger = logging.getLogger(__name__)


def body(code: str, message: str, detail: Any = None) -> dict[str, Any]:
    return Error(code=code, message=message, detail=detail or {}).model_dump()


def install(app: FastAPI) -> None:
    @app.exception_handler(GPUStackError)
    async def _(request: Request, error: GPUStackError) -> JSONResponse:
        headers = {}
        if isinstance(error, Unavailable):
            headers["Retry-After"] = str(error.retry_after_s)
        if error.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(body(error.code, str(error), error.detail), error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(body("invalid", sentence(error)), HTTPStatus.UNPROCESSABLE_ENTITY)

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        phrase = HTTPStatus(error.status_code).phrase
        message = f"{request.method} {request.url.path}: {phrase.lower()}"
        if error.status_code == HTTPStatus.BAD_REQUEST:  # FastAPI says so of bytes that are no text
            message = "the body cannot be read: want JSON in UTF-8"
        headers = error.headers
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            headers = {"Allow": ", ".join(sorted(_methods(request)))}
        code = phrase.lower().replace(" ", "_")
        return JSONResponse(body(code, message), error.status_code, headers)

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> JSONResponse:
        message = "the server failed on this request; its log says why"
        return JSONResponse(body("internal_error", message), HTTPStatus.INTERNAL_SERVER_ERROR)


def _methods(request: Request) -> set[str]:
    """Those that the path of a request takes; the framework names its first route's alone."""
    routes = [one for one in request.app.routes if one.matches(request.scope)[0] is not Match.NONE]
    return {method for route in routes for method in route.methods}


def sentence(error: RequestValidationError) -> str:
    """What is wrong with a body or a query, each place with its name; values are not repeated."""
    parts = []
    for found in error.errors():
        place = ".".join(
            str(word) for word in found["loc"] if word not in {"body", "query", "path"}
        )
        why = str(found["msg"]).removeprefix("Value error, ")
        if found["type"] == "extra_forbidden":
            why = "unknown parameter" if found["loc"][0] == "query" else "unknown field"
        if found["type"] == "string_pattern_mismatch" and place == "name":
            why = "want 1 to 128 of A-Z a-z 0-9 . _ : / -"
        parts.append(f"{place}: {why}" if place else why)
    return "; ".join(parts)
