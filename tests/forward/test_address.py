"""The loopback rule: every way in which it must not hold."""

import pytest

from gpustack.forward import address
from gpustack.forward.address import FORWARDING
from gpustack.forward.http1 import Headers

HERE = [(b"host", b"127.0.0.1:8080")]


def is_local(peer: str, headers: Headers) -> bool:
    return address.is_local(peer, headers, http10=False)


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize(
    "host", [b"localhost", b"LOCALHOST:80", b"127.0.0.1", b"[::1]:80", b"[::1]", b"localhost."]
)
def test_loopback_to_a_loopback_name_needs_no_login(peer: str, host: bytes) -> None:
    assert is_local(peer, [(b"host", host)])


@pytest.mark.parametrize("peer", ["10.0.0.1", "192.168.1.2", "", "::ffff:10.0.0.1", "fe80::1%lo"])
def test_a_peer_elsewhere_needs_a_login(peer: str) -> None:
    assert not is_local(peer, HERE)


@pytest.mark.parametrize(
    "host",
    [b"evil.example", b"127.0.0.1.evil.example", b"localhost.evil.example", b"10.0.0.1", b"",
     b"evil.example:127", b"[::2]", b"0.0.0.0", b"localhost:80@evil.example",
     b"127.0.0.1%evil.example", b"[127.0.0.1]evil.example", b"[::1]x", b"[::1].evil.example",
     b"::1", b"localhost:", b"localhost:x", b"user@localhost", b"localhost, evil.example"],
)  # fmt: skip
def test_a_foreign_host_is_dns_rebinding(host: bytes) -> None:
    assert not is_local("127.0.0.1", [(b"host", host)])


def test_no_host_proves_nothing() -> None:
    assert not is_local("127.0.0.1", [])


@pytest.mark.parametrize(
    "name", sorted(FORWARDING | {b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto"})
)
def test_a_forwarding_header_means_that_somebody_stands_between(name: bytes) -> None:
    assert not is_local("127.0.0.1", [*HERE, (name, b"127.0.0.1")])


@pytest.mark.parametrize(
    ("origin", "local"),
    [
        (b"http://127.0.0.1:8080", True),
        (b"https://127.0.0.1:8080", True),
        (b"http://127.0.0.1:3000", False),
        (b"http://localhost:8080", False),
        (b"http://evil.example", False),
        (b"http://127.0.0.1:8080.evil.example", False),
        (b"http://evil.example/127.0.0.1:8080", False),
        (b"null", False),
        (b"", False),
        (b"file://", False),
    ],
)
def test_a_page_of_another_origin_needs_a_login(origin: bytes, local: bool) -> None:
    assert is_local("127.0.0.1", [*HERE, (b"origin", origin)]) is local


def test_two_origins_are_none() -> None:
    mine = (b"origin", b"http://127.0.0.1:8080")
    assert not is_local("127.0.0.1", [*HERE, mine, mine])


@pytest.mark.parametrize(
    ("site", "local"),
    [(b"same-origin", True), (b"none", True), (b"cross-site", False), (b"same-site", False),
     (b"", False)],
)  # fmt: skip
def test_an_image_or_script_on_another_sites_page_needs_a_login(site: bytes, local: bool) -> None:
    assert is_local("127.0.0.1", [*HERE, (b"sec-fetch-site", site)]) is local


def test_two_words_on_the_site_are_none() -> None:
    mine = (b"sec-fetch-site", b"none")
    assert not is_local("127.0.0.1", [*HERE, mine, (b"sec-fetch-site", b"cross-site")])
    assert not is_local("127.0.0.1", [*HERE, mine, mine])


def test_http_1_0_is_a_proxy_that_does_not_say_so() -> None:
    assert not address.is_local("127.0.0.1", HERE, http10=True)
