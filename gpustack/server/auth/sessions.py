"""What a login opens, however it was made, and the cookie that it leaves in a browser."""

from datetime import UTC, datetime, timedelta
from typing import Any

from gpustack.lib.secrets import digest, new_secret
from gpustack.schemas import wire
from gpustack.schemas.credentials import CredentialKind, Scope
from gpustack.server.db.database import WriteSession
from gpustack.server.db.tables import Credential, User

SESSION_LIFE = timedelta(hours=2)  # sliding
#: A session's end moves at most this often, so that reading pages is not writing.
SESSION_STEP = timedelta(minutes=5)
#: Binds a login with an identity provider to the browser that began it.
LOGIN_COOKIE = "gpustack_login"
LOGIN_LIFE = timedelta(minutes=10)
_LOGIN_PATH = "/auth"


def begin(session: WriteSession, user: User, provider_session: dict[str, Any] | None = None) -> str:
    """The secret of a new session of `user`, whose row the transaction has locked.

    Args:
        provider_session: what the identity provider needs to end its own session; never shown.
    """
    secret = new_secret() + new_secret()
    session.add(
        Credential(
            kind=CredentialKind.SESSION,
            digest=digest(secret),
            user_id=user.id,
            scopes=[Scope.ALL],
            expires_at=datetime.now(UTC) + SESSION_LIFE,
            provider_session=provider_session,
        )
    )
    return secret


def cookie(secret: str, scheme: str) -> str:
    """The value of Set-Cookie: out of scripts' reach, for as long as a session lives from now.

    Args:
        scheme: by which the browser came. A cookie that came over https never leaves without.
    """
    return _cookie(wire.SESSION_COOKIE, secret, "/", SESSION_LIFE, scheme)


def no_cookie(scheme: str) -> str:
    """The value of Set-Cookie that removes it."""
    return _cookie(wire.SESSION_COOKIE, '""', "/", timedelta(), scheme)


def login_cookie(secret: str, scheme: str) -> str:
    """The value of Set-Cookie for a browser that goes to an identity provider and comes back."""
    return _cookie(LOGIN_COOKIE, secret, _LOGIN_PATH, LOGIN_LIFE, scheme)


def no_login_cookie(scheme: str) -> str:
    """The value of Set-Cookie that removes it."""
    return _cookie(LOGIN_COOKIE, '""', _LOGIN_PATH, timedelta(), scheme)


def _cookie(name: str, value: str, path: str, life: timedelta, scheme: str) -> str:
    safe = "; Secure" if scheme == "https" else ""
    age_s = int(life.total_seconds())
    return f"{name}={value}; HttpOnly; Max-Age={age_s}; Path={path}; SameSite=lax{safe}"
