"""Downloads through the proxies that the environment names.

httpx reads the variables as well, but no networks in NO_PROXY, such as 10.0.0.0/8. Calls between
server, workers and instances are made without any of this.
"""

import ipaddress
from collections.abc import Iterator, Mapping
from urllib.request import getproxies_environment

import httpx

from gpustack.errors import Invalid

SCHEMES = ("http", "https", "socks5", "socks5h")


class ProxiedTransport(httpx.AsyncBaseTransport):
    """Sends each request through the proxy that is for its address, or directly.

    The variables are HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, in either case; the lower
    case wins. They are read once.

    Raises:
        Invalid: one of them names no proxy. It is not quoted: a password may stand in it.
    """

    def __init__(self) -> None:
        self._said = getproxies_environment()
        for name in ("http", "https", "all"):
            if (said := self._said.get(name)) is not None:
                self._said[name] = _checked(name, said)
        self._verify = httpx.create_ssl_context()  # SSL_CERT_FILE counts, as without a proxy
        self._transports: dict[str | None, httpx.AsyncHTTPTransport] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        proxy = proxy_for(url.scheme, url.host, url.port, self._said)
        if proxy not in self._transports:
            self._transports[proxy] = httpx.AsyncHTTPTransport(verify=self._verify, proxy=proxy)
        return await self._transports[proxy].handle_async_request(request)

    async def aclose(self) -> None:
        for transport in self._transports.values():
            await transport.aclose()


def proxy_for(scheme: str, host: str, port: int | None, said: Mapping[str, str]) -> str | None:
    """PURE: the proxy for an address; None: it is called directly.

    Args:
        port: None: the scheme's own.
        said: the variables by the word before _proxy: http, https, all, no.
    """
    ports = {port or {"http": 80, "https": 443}.get(scheme)}
    for name, wanted in _exceptions(said.get("no", "")):
        if (wanted is None or wanted in ports) and _is_meant(host.lower(), name):
            return None
    return said.get(scheme) or said.get("all")


def _exceptions(no_proxy: str) -> Iterator[tuple[str, int | None]]:
    """Names and their ports; None: every port."""
    for entry in no_proxy.lower().split(","):
        name, colon, port = entry.strip().rpartition(":")
        if colon and port.isdigit() and (":" not in name or name.endswith("]")):
            yield name, int(port)
        elif entry.strip():
            yield entry.strip(), None


def _is_meant(host: str, name: str) -> bool:
    if name == "*":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        name = name.removeprefix("*").lstrip(".")
        return bool(name) and (host == name or host.endswith(f".{name}"))
    try:
        return address in ipaddress.ip_network(name.strip("[]"), strict=False)
    except ValueError:
        return False


def _checked(name: str, said: str) -> str:
    address = said if "://" in said else f"http://{said}"
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in SCHEMES or not url.host:
        raise Invalid(
            f"variable {name.upper()}_PROXY names no proxy: want http://host:port or "
            "socks5://host:port, with user:password@ before the host if need be"
        )
    return address
