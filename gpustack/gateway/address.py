"""PURE: what a request's address and origin say about who sends it."""

from typing import Final

from gpustack.forward.http1 import Headers
from gpustack.lib.net import is_loopback, split_host
from gpustack.lib.origin import authority

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


def is_local(peer: str, headers: Headers) -> bool:
    """Whether a request surely comes from this machine and from no foreign web page.

    The socket's peer is loopback; Host is a loopback name or address (a foreign name that
    resolves here is DNS rebinding); nothing says that a proxy passed it on; and Origin, where
    there is one, is the very host that was asked.
    """
    if not is_loopback(peer):
        return False
    host: bytes | None = None
    origin: bytes | None = None
    for name, value in headers:
        if name in FORWARDING or name.startswith(b"x-forwarded"):
            return False
        if name == b"host":
            host = value
        elif name == b"origin":
            if origin is not None:
                return False
            origin = value
    if host is None or not is_loopback(split_host(host.decode("latin-1"))):
        return False
    return origin is None or authority(origin.decode("latin-1")) == host.decode("latin-1").lower()
