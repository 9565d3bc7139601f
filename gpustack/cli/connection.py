"""Which server a command talks to, and as whom."""

import asyncio
import dataclasses
import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import click

from gpustack.cli.lock_file import running_node
from gpustack.cli.words import typed
from gpustack.config.values import parse
from gpustack.errors import SettingsError, Unavailable
from gpustack.lib.net import is_loopback
from gpustack.lib.platform import default_data_dir
from gpustack.lib.secrets import Secret

if TYPE_CHECKING:
    import ssl

    from gpustack.client import Client

T = TypeVar("T")

DEFAULT_PORT = 80


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the server is, and the credential to show; None: what loopback allows.

    Attributes:
        data_dir: of the server on this machine; None: a URL was given.
        ca: authorities that may sign the server's certificate; None: this system's.
        fingerprint: of the server's key, which is then all that counts.
        hint: what to say besides if nobody answers.
    """

    url: str
    token: Secret | None
    data_dir: Path | None = None
    hint: str = ""
    ca: Path | None = None
    fingerprint: str | None = None

    def client(self) -> "Client":
        from gpustack.client import Client  # httpx and pydantic: not for --help

        return Client(self.url, self.token.reveal() if self.token else None, tls=self.tls())

    def tls(self) -> "ssl.SSLContext | None":
        """Whom to believe that it is the server; None: it is called without TLS.

        Raises:
            SettingsError: --server-ca is of no use.
        """
        if not self.url.startswith("https:"):
            return None
        from gpustack.lib import trust  # not for --help

        return trust.of_server(self.ca, self.fingerprint)

    def run(self, act: "Callable[[Client], Awaitable[T]]") -> T:
        """What `act` answers, given a client of this server."""

        async def main() -> T:
            async with self.client() as client:
                return await act(client)

        try:
            return asyncio.run(main())
        except Unavailable as error:
            raise (Unavailable(f"{error}; {self.hint}") if self.hint else error) from None


def connection(url: str | None, token: str | None, data_dir: Path | None) -> Connection:
    """The connection that options and environment mean.

    On the server's own machine nothing need be given: the node's lock file has its port, and
    the administrator's credential is readable to whoever may read the data directory. That
    credential goes to this machine only.

    Raises:
        SettingsError: the URL is none, or the token cannot be one.
    """
    place = data_dir or default_data_dir()
    own, hint = None, ""
    if url is None:
        own, port = place, _port(place)
        if port is None:
            hint = f"no node runs on data directory {place}: give --data-dir or --server-url"
        url = f"http://127.0.0.1:{port or DEFAULT_PORT}"
    host = host_in(url)
    if token:
        if not all("!" <= character <= "~" for character in token):
            raise SettingsError("--api-key: a key has neither spaces nor letters beyond ASCII")
        return Connection(url, Secret(token), own, hint)
    return Connection(url, _local_admin(place) if is_loopback(host) else None, own, hint)


def _fingerprint(text: str | None) -> str | None:
    try:
        return None if text is None else parse("fingerprint", text)
    except ValueError as error:
        raise SettingsError(f"--server-fingerprint: {error}") from None


def host_in(url: str, option: str = "--server-url") -> str:
    """The host of a server's URL.

    Raises:
        SettingsError: it is none; names the option that gave it.
    """
    try:
        parts = urlsplit(url)
        # The port raises when it is none.
        if parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0:
            return parts.hostname
    except ValueError:
        pass
    raise SettingsError(f"{option}: want a URL such as http://server:80, got {url!a}")


def _port(data_dir: Path) -> int | None:
    """Of the server node that runs on `data_dir`, or perhaps does; None: no node runs there."""
    try:
        node = running_node(data_dir)
    except OSError:  # not ours to read
        return DEFAULT_PORT
    if node is None:
        return None
    port = node.get("port")
    return port if isinstance(port, int) else DEFAULT_PORT


def _local_admin(data_dir: Path) -> Secret | None:
    try:
        return Secret((data_dir / "local_admin").read_text().strip())
    except OSError:
        return None


def connected(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a connection; it is called with the connection first."""

    @click.option(
        "--server-url",
        envvar="GPUSTACK_SERVER_URL",
        metavar="URL",
        help="The server; by default the one on this machine.",
    )
    @click.option(
        "--api-key",
        envvar="GPUSTACK_API_KEY",
        metavar="KEY",
        help="Not needed on the server's own machine. Prefer the variable GPUSTACK_API_KEY: "
        "other users can read command lines.",
    )
    @click.option(
        "--data-dir", envvar="GPUSTACK_DATA_DIR", metavar="DIR", type=click.Path(path_type=Path),
        help="Data directory of the server on this machine.",
    )  # fmt: skip
    @click.option(
        "--server-ca", envvar="GPUSTACK_SERVER_CA", metavar="FILE",
        type=click.Path(path_type=Path),
        help="Authorities that may sign the server's certificate, instead of this system's.",
    )  # fmt: skip
    @click.option(
        "--server-fingerprint", envvar="GPUSTACK_SERVER_FINGERPRINT", metavar="TEXT",
        help="Fingerprint of the server's public key, which is then all that counts.",
    )  # fmt: skip
    @functools.wraps(command)
    def called(
        *args: Any,
        server_url: str | None,
        api_key: str | None,
        data_dir: Path | None,
        server_ca: Path | None,
        server_fingerprint: str | None,
        **more: Any,
    ) -> Any:
        server = connection(typed(server_url), typed(api_key), data_dir)
        fingerprint = _fingerprint(typed(server_fingerprint))
        server = dataclasses.replace(server, ca=server_ca, fingerprint=fingerprint)
        return command(server, *args, **{name: typed(given) for name, given in more.items()})

    return called
