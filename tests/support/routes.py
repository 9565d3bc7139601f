"""The routes of an application, as it has them: nobody has to remember to list one."""

import re
from collections.abc import Iterable, Iterator

#: DESIGN: "Public without credentials: /healthz, /readyz, /version, the ways in below /auth/".
#: Of those below /auth/, leaving and changing a password are no ways in.
#: Where they are not configured, OpenID Connect's and SAML's ways in are answered with 404.
OIDC = {"/auth/oidc/login", "/auth/oidc/callback"}
SAML = {
    "/auth/saml/login", "/auth/saml/callback", "/auth/saml/metadata", "/auth/saml/logout/callback",
}  # fmt: skip
PUBLIC = {"/healthz", "/readyz", "/version", "/auth/login", "/auth/config"} | OIDC | SAML


def walk(routes: Iterable[object]) -> Iterator[tuple[str, str]]:
    """Method and path of each route, also of those in included routers."""
    for route in routes:
        included = getattr(route, "original_router", None)
        if included is not None:
            yield from walk(included.routes)
        else:
            for method in sorted(getattr(route, "methods", None) or ["GET"]):
                yield method, str(getattr(route, "path"))  # noqa: B009  no common type


def concrete(pattern: str) -> str:
    """A path that the pattern matches."""
    return re.sub(r"\{[^}]*\}", "1", pattern)
