"""Who sends a request: the credential in it, looked up in the table."""

from datetime import UTC, datetime
from hashlib import sha256
from typing import Final, NamedTuple

from gpustack.errors import Forbidden, PasswordChangeRequired, Unauthorized
from gpustack.forward.http1 import Headers, first
from gpustack.gateway.tables import Credential
from gpustack.lib.origin import is_foreign
from gpustack.schemas.wire import SESSION_COOKIE

_COOKIE: Final = SESSION_COOKIE.encode() + b"="
#: Users and what acts for them. Workers and gateways are parts of the product: they run no models.
_MAY_INFER: Final = frozenset({"key", "session", "local"})
_SCOPES: Final = frozenset({"inference", "*"})


class Presented(NamedTuple):
    """A secret that came with a request. Never logged.

    Attributes:
        cookie: the browser sent it by itself, so the page has to be ours.
    """

    secret: bytes
    cookie: bool

    def digest(self) -> str:
        return sha256(self.secret).hexdigest()

    def __repr__(self) -> str:
        return "Presented(********)"


def presented(headers: Headers) -> Presented | None:
    """The credential of a request: Authorization, x-api-key, api-key, then the session cookie.

    An Authorization header of another scheme is a credential that nobody knows.
    """
    key = alternative = cookie = None
    for name, value in headers:
        if name == b"authorization":
            scheme, _, secret = value.partition(b" ")
            return Presented(secret.strip() if scheme.lower() == b"bearer" else b"", cookie=False)
        if name == b"x-api-key":
            key = value
        elif name == b"api-key":
            alternative = value
        elif name == b"cookie" and cookie is None:
            cookie = _session(value)
    if key is not None or alternative is not None:
        return Presented(key if key is not None else alternative or b"", cookie=False)
    return None if cookie is None else Presented(cookie, cookie=True)


def _session(cookies: bytes) -> bytes | None:
    for pair in cookies.split(b";"):
        pair = pair.strip()
        if pair.startswith(_COOKIE):
            return pair[len(_COOKIE) :].strip(b'"')
    return None


def check(credential: Credential, *, cookie: bool, method: str, headers: Headers) -> None:
    """Return if `credential` may run models.

    Raises:
        Unauthorized: it has expired.
        Forbidden: it may not, or a foreign page used a browser's cookie.
    """
    if credential.expires_at is not None and credential.expires_at <= datetime.now(UTC):
        raise Unauthorized("This credential has expired.")
    if credential.kind not in _MAY_INFER or _SCOPES.isdisjoint(credential.scopes):
        raise Forbidden("This credential may not run models.")
    if credential.password_change_required:
        raise PasswordChangeRequired()
    if cookie and method not in ("GET", "HEAD") and _is_foreign(headers):
        raise Forbidden("A page of another origin may not use this session.")


def _is_foreign(headers: Headers) -> bool:
    origin, host, site = (
        None if (value := first(headers, name)) is None else value.decode("latin-1")
        for name in (b"origin", b"host", b"sec-fetch-site")
    )
    return is_foreign(origin=origin, host=host, fetch_site=site)
