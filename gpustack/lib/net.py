"""Addresses and ports of this machine."""

import ipaddress
import socket
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether `host` (a name, an address, with or without brackets) can only mean this machine."""
    host = host.strip("[]").split("%", 1)[0].rstrip(".").lower()
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def split_host(authority: str) -> str:
    """The host of "host", "host:port" or "[v6]:port"; brackets removed."""
    if authority.startswith("["):
        return authority[1:].partition("]")[0]
    return authority.rpartition(":")[0] if authority.count(":") == 1 else authority


def url_host(host: str) -> str:
    """`host` as it stands in a URL: IPv6 addresses get brackets."""
    return f"[{host}]" if ":" in host else host


def can_bind(host: str, port: int) -> bool:
    """Whether nothing listens on `port` of `host` now. Shows it by binding."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def address_towards(url: str | None) -> str:
    """The address of this machine that packets to `url`'s host leave from.

    Sends nothing. Without a URL, or without a route, 127.0.0.1.
    """
    host = (urlsplit(url).hostname if url else None) or "192.0.2.1"  # RFC 5737: never a real host
    try:
        info = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(info[0], socket.SOCK_DGRAM) as probe:
            probe.connect(info[4])
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
