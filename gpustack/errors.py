"""Every error this project raises on purpose.

    GPUStackError           500
    ├── BadRequest          400   the request cannot be understood
    ├── Unauthorized        401   no credential, or one that nobody knows
    ├── Forbidden           403   a known credential that may not do this
    │   └── PasswordChangeRequired
    ├── NotFound            404
    ├── Conflict            409   somebody else changed it first, or the name is taken
    ├── TooLarge            413   more bytes than this place takes
    ├── UnsupportedMediaType 415  a body of a kind that this place does not read
    ├── Invalid             422   understood, but it contradicts itself or the cluster
    ├── EngineFailed        502   an inference engine exited or never became healthy
    ├── Unavailable         503   try again later; carries retry_after_s
    │   ├── NoReadyInstance
    │   ├── DatabaseAway          the database cannot be used; nobody knows until when
    │   ├── Contended             another transaction came first; nothing was changed
    │   └── TooMany         429   too many at once; the same later will do
    ├── LeaseLost           (server only) another server leads now
    └── SettingsError       (start only) an option, variable or file says something impossible

`code` is part of the wire contract: clients branch on it, so it never changes.
"""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class GPUStackError(Exception):
    """Something went wrong inside gpustack.

    Base of every deliberate error; anything else escaping is a bug. The first line of a class's
    docstring is its default message.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str | None = None, **detail: object) -> None:
        default = (self.__doc__ or type(self).__name__).strip().splitlines()[0]
        super().__init__(message or default)
        self.detail = detail


class BadRequest(GPUStackError):
    """The request cannot be understood."""

    status, code = 400, "bad_request"


class Unauthorized(GPUStackError):
    """A valid credential is needed: log in, or send an API key as a bearer token."""

    status, code = 401, "unauthorized"


class Forbidden(GPUStackError):
    """This credential may not do that."""

    status, code = 403, "forbidden"


class PasswordChangeRequired(Forbidden):
    """The generated password must be changed first: POST /auth/update-password."""

    code = "password_change_required"


class NotFound(GPUStackError):
    """No such resource."""

    status, code = 404, "not_found"


class Conflict(GPUStackError):
    """The resource changed since it was read."""

    status, code = 409, "conflict"


class TooLarge(GPUStackError):
    """The request is larger than this server takes."""

    status, code = 413, "too_large"


class UnsupportedMediaType(GPUStackError):
    """The body is of a kind that is not read here."""

    status, code = 415, "unsupported_media_type"


class Invalid(GPUStackError):
    """The request cannot be satisfied as written."""

    status, code = 422, "invalid"


class EngineFailed(GPUStackError):
    """An inference engine exited or never became healthy."""

    status, code = 502, "engine_failed"


class Unavailable(GPUStackError):
    """Temporarily unable to serve this request."""

    status, code = 503, "unavailable"

    def __init__(
        self, message: str | None = None, *, retry_after_s: int = 1, **detail: object
    ) -> None:
        super().__init__(message, **detail)
        self.retry_after_s = retry_after_s


class NoReadyInstance(Unavailable):
    """No instance of this model is running."""

    code = "no_ready_instance"


class DatabaseAway(Unavailable):
    """The database cannot be used now; the server's log says why."""

    code = "database_unavailable"


class Contended(Unavailable):
    """Others changed the same things at the same moment, and nothing was changed: try again."""

    code = "contended"


class TooMany(Unavailable):
    """Too many requests of this kind at once."""

    status, code = 429, "too_many_requests"


class LeaseLost(GPUStackError):
    """Another server leads now: what this one was about to write, it does not write."""

    code = "lease_lost"


class SettingsError(GPUStackError):
    """A start option has an impossible value."""

    code = "settings_error"


def raises(*errors: type[GPUStackError]) -> Callable[[F], F]:
    """Say what a route, or what a route depends on, lets out of its own; read by `raised`."""

    def said(function: F) -> F:
        function.__raises__ = (*raised(function), *errors)  # type: ignore[attr-defined]
        return function

    return said


def raised(function: Callable[..., Any] | None) -> tuple[type[GPUStackError], ...]:
    """What a function says that it raises."""
    return getattr(function, "__raises__", ())
