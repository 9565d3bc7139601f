"""Errors of the gateway's own, in the shape of OpenAI's API."""

from typing import Final

import msgspec

from gpustack.errors import GPUStackError, NotFound, Unavailable
from gpustack.forward.exchange import Exchange
from gpustack.forward.http1 import Headers

_TYPES: Final = {
    400: "invalid_request_error",
    401: "invalid_request_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
#: Where OpenAI has a word of its own that clients branch on.
_CODES: Final = {"unauthorized": "invalid_api_key", "bad_request": "invalid_request"}


class ModelNotFound(NotFound):
    """There is no such model."""

    code = "model_not_found"


class MethodNotAllowed(GPUStackError):
    """This path does not take this method."""

    status, code = 405, "method_not_allowed"


class EngineUnreachable(GPUStackError):
    """The engine was lost before it answered."""

    status, code = 502, "engine_unreachable"


def openai(error: GPUStackError) -> tuple[Headers, bytes]:
    """Headers and body of an error that is the gateway's, not an engine's: `src` says so.

    The error's detail `param` names the field that is wrong.
    """
    headers: Headers = [(b"content-type", b"application/json")]
    if isinstance(error, Unavailable):
        headers.append((b"retry-after", b"%d" % error.retry_after_s))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    said = {
        "message": str(error),
        "type": _TYPES.get(error.status, "server_error"),
        "param": error.detail.get("param"),
        "code": _CODES.get(error.code, error.code),
        "src": "gateway",
    }
    return headers, msgspec.json.encode({"error": said})


def refuse(exchange: Exchange, error: GPUStackError) -> None:
    """Answer a request to a model with `error`; a started answer is broken off instead."""
    exchange.dialect = openai
    exchange.respond_error(error)
