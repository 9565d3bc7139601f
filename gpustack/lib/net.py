"""Addresses and ports of this machine."""

import ipaddress
import re
import socket
from collections.abc import Mapping, Sequence
from typing import Final
from urllib.parse import urlsplit

_AUTHORITY: Final = re.compile(
    r"(?:(?P<name>[A-Za-z0-9._-]+)|\[(?P<v6>[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*)\])(?::[0-9]{1,5})?"
)

_USUAL: Final = frozenset({"127.0.0.1", "::1", "localhost"})


def is_loopback(host: str) -> bool:
    """Whether `host` (a name, an address, with or without brackets) can only mean this machine."""
    if host in _USUAL:  # gateways ask for every request
        return True
    host = host.strip("[]").split("%", 1)[0].rstrip(".").lower()
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


Ip = ipaddress.IPv4Address | ipaddress.IPv6Address


def parse_ip(text: str) -> Ip | None:
    """The address in "v4", "v4:port", "v6" or "[v6]:port"; None: there is none.

    An IPv4 address that a socket for both shows as IPv6 is the IPv4 address.
    """
    try:
        address = ipaddress.ip_address((host_of(text) or text).partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def host_of(authority: str) -> str | None:
    """The host of "host", "host:port", "[v6]" or "[v6]:port", without brackets; None: not one."""
    found = _AUTHORITY.fullmatch(authority)
    return (found["name"] or found["v6"]) if found else None


def url_host(host: str) -> str:
    """`host` as it stands in a URL: IPv6 addresses get brackets."""
    return f"[{host}]" if ":" in host else host


def without_credentials(url: str) -> str:
    """`url` as it may be shown: without the user and password that may stand before its host."""
    return re.sub(r"//[^/?#]*@", "//", url)


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


#: Documentation addresses (RFC 5737, RFC 3849): never a real host, so a default route leads there.
_ANYWHERE: Final = ("192.0.2.1", "2001:db8::1")


def address_towards(url: str | None) -> str:
    """`route_towards`, or 127.0.0.1."""
    return route_towards(url) or "127.0.0.1"


def route_towards(url: str | None) -> str | None:
    """The address of this machine that packets to `url`'s host leave from; None: no route.

    Sends nothing, but a name may have to be resolved. Without a URL: to anywhere else, by IPv4 if
    that leads there.
    """
    host = urlsplit(url).hostname if url else None
    for each in (host,) if host else _ANYWHERE:
        try:
            found = socket.getaddrinfo(each, 9, type=socket.SOCK_DGRAM)
        except OSError:
            continue
        for family, kind, _, _, place in found:
            try:
                with socket.socket(family, kind) as probe:
                    probe.connect(place)
                    return str(probe.getsockname()[0])
            except OSError:
                continue  # of a host's addresses, perhaps only those of the other family
    return None


def interface_address(name: str) -> str:
    """The address of this machine's network interface `name`.

    Raises:
        ValueError: as `address_of`.
    """
    import psutil

    found = psutil.net_if_addrs()
    return address_of(
        name, {one: [(of.family, of.address) for of in found[one]] for one in sorted(found)}
    )


def address_of(name: str, interfaces: Mapping[str, Sequence[tuple[int, str]]]) -> str:
    """PURE: the address of one interface, IPv4 if it has any; never one that its link alone knows.

    Args:
        interfaces: by name: families and addresses.

    Raises:
        ValueError: there is no such interface, or it has no address; names those that have one.
    """
    usable = {one: _usable(addresses) for one, addresses in interfaces.items()}
    if found := usable.get(name):
        return found[0]
    lack = "has no address" if name in usable else "is not there"
    others = ", ".join(f"{one} ({own[0]})" for one, own in usable.items() if own)
    raise ValueError(f"network interface {name[:40]!r} {lack}; with one there are: {others}")


def _usable(addresses: Sequence[tuple[int, str]]) -> list[str]:
    """IPv4 first."""
    plain = [(family, text.partition("%")[0]) for family, text in addresses]
    own = [text for family, text in plain if family == socket.AF_INET]
    other = [text for family, text in plain if family == socket.AF_INET6]
    return own + [text for text in other if not ipaddress.IPv6Address(text).is_link_local]
