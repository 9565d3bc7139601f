"""Calls over TLS: whom the client believes, and what it says of all others."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from gpustack import errors
from gpustack.client import Client
from gpustack.config.load import load
from gpustack.forward.exchange import IGNORED, Receiver
from gpustack.forward.listener import Exchange, Server
from gpustack.gateway.tls import Certificate
from gpustack.lib import trust
from gpustack.lib.platform import listen
from gpustack.server.api.join_tokens import about_server
from tests.support.certificate import Issued, expire, issue
from tests.support.wait import settled

Tls = Callable[[Issued], ssl.SSLContext | None]


class Place:
    """A server, and what it was asked."""

    def __init__(self) -> None:
        self.seen: list[bytes | None] = []
        self.answers = True

    def __call__(self, exchange: Exchange) -> Receiver:
        self.seen.append(exchange.header(b"authorization"))
        if self.answers:
            exchange.respond(202)
        return IGNORED


@asynccontextmanager
async def served(shown: Issued | None, address: str) -> AsyncIterator[tuple[Place, str]]:
    place, sock = Place(), listen(address, 0)
    server = Server(place)
    context = Certificate(shown.certfile, shown.keyfile).context if shown else None
    await server.listen(sock, tls=context)
    try:
        yield place, f"https://{address}:{sock.getsockname()[1]}"
    finally:
        await settled()
        server.close()


def by_fingerprint(issued: Issued) -> ssl.SSLContext:
    return trust.key(trust.fingerprint(issued.der))


def by_authority(issued: Issued) -> ssl.SSLContext:
    return trust.authorities(issued.certfile)


def by_system(_: Issued) -> None:
    return None


def old(issued: Issued) -> Issued:
    return expire(issued, datetime.now(UTC) - timedelta(days=1))


@pytest.mark.parametrize(
    ("tls", "age", "address", "said"),
    [
        (by_authority, None, "127.0.0.1", ""),
        (by_fingerprint, None, "127.0.0.1", ""),
        (by_fingerprint, old, "127.0.0.2", ""),  # the key alone counts, whatever else is wrong
        (by_system, None, "127.0.0.1", "signed by nobody whom this machine trusts: give"),
        (by_authority, None, "127.0.0.2", "its certificate is not for 127.0.0.2: have"),
        (by_authority, old, "127.0.0.1", "its certificate has expired: renew it on the server"),
    ],
)
async def test_a_server_is_called_if_it_is_known(
    tmp_path: Path, tls: Tls, age: Callable[[Issued], Issued] | None, address: str, said: str
) -> None:
    issued = issue(tmp_path)
    shown = age(issued) if age else issued
    async with served(shown, address) as (place, url):
        async with Client(url, "the-credential", tls=tls(issued)) as client:
            if said:
                with pytest.raises(errors.Unavailable, match=said):
                    await client.models.delete(1)
            else:
                await client.models.delete(1)
        assert place.seen == ([] if said else [b"Bearer the-credential"])


async def test_another_key_is_named_with_what_would_be_right(tmp_path: Path) -> None:
    issued, other = issue(tmp_path), issue(tmp_path, "other")
    is_shown, is_wanted = trust.fingerprint(issued.der), trust.fingerprint(other.der)
    said = f"its key has fingerprint {is_shown}, not {is_wanted}: if the server was given another"
    async with served(issued, "127.0.0.1") as (place, url):
        async with Client(url, "the-credential", tls=by_fingerprint(other)) as client:
            with pytest.raises(errors.Unavailable, match=said):
                await client.models.delete(1)
        assert place.seen == []


@pytest.mark.parametrize("right", [True, False])
async def test_who_calls_without_an_event_loop_is_as_careful(tmp_path: Path, right: bool) -> None:
    """As `gpustack chat` does."""
    issued = issue(tmp_path)
    pin = by_fingerprint(issued if right else issue(tmp_path, "other"))

    def call(url: str) -> int:
        with httpx.Client(base_url=url, verify=pin, trust_env=False) as client:
            return client.get("/", headers={"Authorization": "Bearer the-credential"}).status_code

    async with served(issued, "127.0.0.1") as (place, url):
        if right:
            assert await asyncio.to_thread(call, url) == 202
        else:
            with pytest.raises(httpx.ConnectError, match="its key has fingerprint"):
                await asyncio.to_thread(call, url)
        assert place.seen == ([b"Bearer the-credential"] if right else [])


async def test_a_server_that_is_only_slow_is_not_said_to_be_another(tmp_path: Path) -> None:
    issued = issue(tmp_path)
    async with served(issued, "127.0.0.1") as (place, url):
        place.answers = False
        pin = by_fingerprint(issued)
        async with Client(url, "the-credential", tls=pin, timeout_s=0.5) as client:
            with pytest.raises(errors.Unavailable, match="Timeout"):
                await client.models.delete(1)
        assert place.seen == [b"Bearer the-credential"]


async def test_a_port_without_tls_is_named(tmp_path: Path) -> None:
    async with served(None, "127.0.0.1") as (place, url):
        async with Client(url, "the-credential", tls=by_fingerprint(issue(tmp_path))) as client:
            with pytest.raises(errors.Unavailable, match="it does not speak TLS there: want"):
                await client.models.delete(1)
        assert place.seen == []


def test_a_renewed_certificate_of_the_same_key_has_the_same_fingerprint(tmp_path: Path) -> None:
    issued = issue(tmp_path)
    before, der = trust.fingerprint(issued.der), issued.der
    old(issued)
    assert issued.der != der
    assert trust.fingerprint(issued.der) == before
    assert trust.fingerprint(issue(tmp_path, "other").der) != before


def test_authorities_that_are_none_are_named_in_one_sentence(tmp_path: Path) -> None:
    nonsense = tmp_path / "ca.pem"
    nonsense.write_text("nonsense")
    for file, why in ((nonsense, "want certificates as PEM"), (tmp_path / "none", "No such file")):
        with pytest.raises(errors.SettingsError, match=f"--server-ca {file}: {why}"):
            trust.of_server(file, None)


@pytest.mark.parametrize("vouched_for", [True, False])
def test_a_join_command_needs_the_fingerprint_where_no_authority_vouches_for_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vouched_for: bool
) -> None:
    issued = issue(tmp_path)
    given = {"ssl_certfile": str(issued.certfile), "ssl_keyfile": str(issued.keyfile)}
    given |= {"data_dir": str(tmp_path), "advertise_address": "127.0.0.1", "tls_port": "8443"}
    if vouched_for:
        monkeypatch.setenv("SSL_CERT_FILE", str(issued.certfile))  # OpenSSL's, for its own system
    assert about_server(load(given, {}).settings) == {
        "server_url": "https://127.0.0.1:8443",
        "server_fingerprint": trust.fingerprint(issued.der),
        "server_is_vouched_for": vouched_for,
    }
    for url, knows in (("https://x.test", False), ("https://x.test:8443", True)):
        elsewhere = about_server(load(given | {"server_external_url": url}, {}).settings)
        assert ("server_fingerprint" in elsewhere) == knows  # a proxy has a key of its own
        assert not elsewhere.get("server_is_vouched_for")


def test_a_server_without_a_certificate_has_no_fingerprint(tmp_path: Path) -> None:
    given = {"data_dir": str(tmp_path), "advertise_address": "127.0.0.1", "port": "8000"}
    assert about_server(load(given, {}).settings) == {"server_url": "http://127.0.0.1:8000"}
