"""Proxies in front of the public ports: whose word of the client is believed, and whose is not."""

from collections.abc import Iterable, Iterator, Sequence
from ipaddress import ip_network

from gpustack.forward.exchange import Exchange, Receiver
from gpustack.forward.http1 import Headers
from gpustack.forward.listener import App
from gpustack.lib.net import Ip, parse_ip

_FOR, _PROTO = b"x-forwarded-for", b"x-forwarded-proto"


class Proxies:
    """PURE: `--trusted-proxies`, and what they say."""

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks = tuple(ip_network(one) for one in networks)

    def trusts(self, peer: str) -> bool:
        return self._has(parse_ip(peer))

    def _has(self, address: Ip | None) -> bool:
        return address is not None and any(address in network for network in self._networks)

    def client(self, peer: str, headers: Headers) -> str:
        """Whom `peer`, a trusted proxy, passes a request on for.

        Each proxy adds to the right whom it was asked by. So the first from the right that is no
        trusted proxy is the client, and what stands left of it is what the client made up. What
        is no address is nobody's: then it is the proxy that wrote it down.
        """
        for address in _from_the_right(headers):
            if address is None:
                break
            peer = str(address)
            if not self._has(address):
                break
        return peer


def _from_the_right(headers: Headers) -> Iterator[Ip | None]:
    """Each address when it is asked for: a client may have made up thousands."""
    said = b",".join(value for name, value in headers if name == _FOR)
    while said:
        said, _, one = said.rpartition(b",")
        yield parse_ip(one.decode("latin-1").strip())


def scheme(headers: Headers) -> bytes | None:
    """PURE: by which scheme the nearest proxy was asked; None: it does not say."""
    values = [value for name, value in headers if name == _PROTO]
    last = values[-1].rpartition(b",")[2].strip().lower() if values else b""
    return last if last in (b"http", b"https") else None


def around(app: App, networks: Sequence[str]) -> App:
    """`app`, told of the client where a trusted proxy asks for one."""
    if not networks:
        return app
    proxies = Proxies(networks)

    def answer(exchange: Exchange) -> Receiver:
        if proxies.trusts(exchange.peer):
            client = proxies.client(exchange.peer, exchange.headers)
            exchange.passed_on_for(client, scheme(exchange.headers))
        return app(exchange)

    return answer
