"""PURE: where requests carry credentials, and which counts when there are several.

One rule for every part that reads them, so that no request is one user here and another there.
"""

from collections.abc import Iterable
from typing import Final

import msgspec

#: Lower-case names of the headers that `shown` looks at.
CARRIERS: Final = ("authorization", "x-api-key", "api-key", "cookie")


class Shown(msgspec.Struct, frozen=True):
    """A secret that came with a request. Never logged.

    Attributes:
        secret: empty for a credential that nobody can know.
        cookie: the browser sent it by itself, so the page has to be ours.
    """

    secret: str
    cookie: bool

    def __repr__(self) -> str:
        return "Shown(********)"


def shown(headers: Iterable[tuple[str, str]], session_cookie: str) -> Shown | None:
    """The credential of a request, or None.

    The first of: Authorization (the first, and whatever its scheme: one that is not Bearer is a
    credential that nobody knows), x-api-key and api-key unless empty, and the session cookie, of
    several the last.

    Args:
        headers: (lower-case name, value) in the order they came.
    """
    keys: dict[str, str] = {}
    session = ""
    for name, value in headers:
        if name == "authorization":
            scheme, _, token = value.partition(" ")
            return Shown(token.strip() if scheme.lower() == "bearer" else "", False)
        if name in ("x-api-key", "api-key"):
            keys.setdefault(name, value.strip())
        elif name == "cookie":
            session = _cookie(value, session_cookie) or session
    if key := keys.get("x-api-key") or keys.get("api-key"):
        return Shown(key, False)
    return Shown(session, True) if session else None


def _cookie(cookies: str, wanted: str) -> str:
    found = ""
    for pair in cookies.split(";"):
        if wanted not in pair:  # most are of no concern here
            continue
        name, _, value = pair.partition("=")
        if name.strip() == wanted:
            found = value.strip().strip('"') or found
    return found
