"""Who sends a request: the credential in it, looked up in the table."""

from time import time
from typing import Final

from gpustack.errors import Forbidden, PasswordChangeRequired, Unauthorized
from gpustack.forward.http1 import Headers, first
from gpustack.gateway.tables import Credential, Model, Tables
from gpustack.lib.carriers import CARRIERS, Shown, shown
from gpustack.lib.origin import is_foreign
from gpustack.schemas.wire import SESSION_COOKIE

_CARRIERS: Final = {name.encode(): name for name in CARRIERS}
#: Users and what acts for them. Workers and gateways are parts of the product: they run no models.
_MAY_INFER: Final = frozenset({"key", "session", "local"})
_SCOPES: Final = frozenset({"inference", "*"})


def presented(headers: Headers) -> Shown | None:
    """The credential of a request, by the rule of `lib.carriers`."""
    pairs = [
        (_CARRIERS[name], value.decode("latin-1")) for name, value in headers if name in _CARRIERS
    ]
    return shown(pairs, SESSION_COOKIE) if pairs else None


def check(credential: Credential, *, cookie: bool, method: str, headers: Headers) -> None:
    """Return if `credential` may run models.

    Args:
        cookie: a browser sent it by itself, whatever page asked.

    Raises:
        Unauthorized: it has expired, or its user is disabled.
        Forbidden: it may not, or a foreign page used a browser's cookie.
    """
    check_standing(credential)
    if credential.kind not in _MAY_INFER or _SCOPES.isdisjoint(credential.scopes):
        raise Forbidden("This credential may not run models.")
    if credential.password_change_required:
        raise PasswordChangeRequired()
    if cookie and method not in ("GET", "HEAD") and from_foreign_page(headers):
        raise Forbidden("A page of another origin may not use this session.")


def check_standing(credential: Credential) -> None:
    """Return if `credential` is anybody's.

    Raises:
        Unauthorized: it has expired, or its user is disabled.
    """
    if credential.ends_at is not None and credential.ends_at <= time():
        raise Unauthorized("This credential has expired.")
    if credential.user_disabled:
        raise Unauthorized("The user of this credential is disabled.")


def check_again(then: Credential, tables: Tables, model: Model | None = None) -> Credential:
    """What `then` is now, if a request that it opened, and that runs `model`, may go on.

    Raises:
        Unauthorized: the credential is gone or has expired, or its user is disabled.
        Forbidden: it may not any more.
    """
    now = tables.credentials.get(then.id)
    if now is None or now.digest != then.digest:
        raise Unauthorized("This credential was revoked.")
    check(now, cookie=False, method="POST", headers=[])
    if model is not None:
        of_now = tables.models.get(model.id, model)
        if not is_for(now, model.name) or not may_use(now, of_now):
            raise Forbidden(f"This credential is not for the model {model.name!r} any more.")
    return now


def is_for(credential: Credential | None, model: str) -> bool:
    """Whether the model is one of those that the credential is for. Nobody's is for all."""
    allowed = None if credential is None else credential.allowed_model_names
    return allowed is None or model in allowed


def may_use(credential: Credential | None, model: Model) -> bool:
    """Whether the model is every user's, or granted to this one. Nobody acts as an administrator.

    Takes no longer with many users and groups.
    """
    grants = model.granted_to
    if grants is None or credential is None or credential.is_admin:
        return True
    return credential.user_id in grants.user_ids or not (
        credential.group_ids.isdisjoint(grants.group_ids)
    )


def from_foreign_page(headers: Headers) -> bool:
    """What `lib.origin.is_foreign` says of a request."""
    origin, host = first(headers, b"origin"), first(headers, b"host")
    if host and b"/" not in host and origin in (b"https://" + host, b"http://" + host):
        return False  # nearly all are the page of this server itself: soon known
    return is_foreign(
        origin=_text(origin),
        host=_text(host),
        fetch_site=_text(first(headers, b"sec-fetch-site")),
    )


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")
