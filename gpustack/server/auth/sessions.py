"""The cookie that a login leaves in a browser."""

from datetime import timedelta

from gpustack.schemas import wire

SESSION_LIFE = timedelta(hours=2)  # sliding
#: A session's end moves at most this often, so that reading pages is not writing.
SESSION_STEP = timedelta(minutes=5)


def cookie(secret: str, scheme: str) -> str:
    """The value of Set-Cookie: out of scripts' reach, for as long as a session lives from now.

    Args:
        scheme: by which the browser came. A cookie that came over https never leaves without.
    """
    return _cookie(secret, int(SESSION_LIFE.total_seconds()), scheme)


def no_cookie(scheme: str) -> str:
    """The value of Set-Cookie that removes it."""
    return _cookie('""', 0, scheme)


def _cookie(value: str, max_age_s: int, scheme: str) -> str:
    safe = "; Secure" if scheme == "https" else ""
    name = wire.SESSION_COOKIE
    return f"{name}={value}; HttpOnly; Max-Age={max_age_s}; Path=/; SameSite=lax{safe}"
