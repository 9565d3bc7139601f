"""PURE: what a request's address and origin say about who sends it."""

from typing import Final

from gpustack.forward.http1 import Headers
from gpustack.lib.net import host_of, is_loopback
from gpustack.lib.origin import is_foreign

#: Headers with which proxies and CDNs say that the socket's peer is not the client. Any of them
#: means that somebody stands between, so a loopback peer proves nothing.
FORWARDING: Final = frozenset(
    {
        b"forwarded",
        b"via",
        b"x-real-ip",
        b"x-client-ip",
        b"x-cluster-client-ip",
        b"x-original-forwarded-for",
        b"x-envoy-external-address",
        b"x-appengine-user-ip",
        b"cf-connecting-ip",
        b"cf-connecting-ipv6",
        b"cf-ray",
        b"true-client-ip",
        b"fastly-client-ip",
        b"fly-client-ip",
        b"client-ip",
        b"cdn-loop",
    }
)
_FORWARDED: Final = b"x-forwarded"

#: What is looked at; twice the same of these says nothing that could be relied on.
_ONCE: Final = frozenset({b"host", b"origin", b"sec-fetch-site"})


def is_forwarding(name: bytes) -> bool:
    """Whether a header called `name` (lower case) says whom a request is passed on for."""
    return name in FORWARDING or name.startswith(_FORWARDED)


def is_local(peer: str, headers: Headers, *, http10: bool) -> bool:
    """Whether a request surely comes from this machine and from no foreign web page.

    The socket's peer is loopback; Host is a loopback name or address (a foreign name that
    resolves here is DNS rebinding); nothing says that a proxy passed it on, and no HTTP/1.0, which
    proxies speak that were told of no header; and no browser says that the page is another's.
    """
    if http10 or not is_loopback(peer):
        return False
    said: dict[bytes, str] = {}
    for name, value in headers:
        if name in FORWARDING or name.startswith(_FORWARDED):
            return False
        if name in _ONCE:
            if name in said:
                return False
            said[name] = value.decode("latin-1")
    host = said.get(b"host")
    if host is None or not is_loopback(host_of(host) or ""):
        return False
    return not is_foreign(
        origin=said.get(b"origin"), host=host, fetch_site=said.get(b"sec-fetch-site")
    )
