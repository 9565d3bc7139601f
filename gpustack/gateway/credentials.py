"""Who sends a request: the credential in it, looked up in the table."""

from datetime import UTC, datetime
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
    if credential.expires_at is not None and credential.expires_at <= datetime.now(UTC):
        raise Unauthorized("This credential has expired.")
    if credential.user_disabled:
        raise Unauthorized("The user of this credential is disabled.")
    if credential.kind not in _MAY_INFER or _SCOPES.isdisjoint(credential.scopes):
        raise Forbidden("This credential may not run models.")
    if credential.password_change_required:
        raise PasswordChangeRequired()
    if cookie and method not in ("GET", "HEAD") and _is_foreign(headers):
        raise Forbidden("A page of another origin may not use this session.")


def check_again(then: Credential, tables: Tables, model: Model | None) -> None:
    """Return if a request that `then` opened, and that runs `model`, may go on.

    Raises:
        Unauthorized: the credential is gone or has expired, or its user is disabled.
        Forbidden: it may not any more.
    """
    now = tables.credentials.get(then.id)
    if now is None or now.digest != then.digest:
        raise Unauthorized("This credential was revoked.")
    check(now, cookie=False, method="POST", headers=[])
    if model is None:
        return
    if not is_for(now, model.name) or not may_use(now, tables.models.get(model.id, model)):
        raise Forbidden(f"This credential is not for the model {model.name!r} any more.")


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


def _is_foreign(headers: Headers) -> bool:
    origin, host, site = (
        None if (value := first(headers, name)) is None else value.decode("latin-1")
        for name in (b"origin", b"host", b"sec-fetch-site")
    )
    return is_foreign(origin=origin, host=host, fetch_site=site)
