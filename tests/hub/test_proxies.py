"""Which way downloads go: shown by a proxy that writes down who it is asked for."""

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpustack.errors import Invalid, Unavailable
from gpustack.hub.files import fetch
from gpustack.hub.profiles import profile
from gpustack.hub.proxies import proxy_for
from gpustack.schemas.models import Source, VersionSpec
from tests.support.certificate import issue
from tests.support.fake_hub import FakeHub, fake_hub
from tests.support.proxy import RecordingProxy, recording_proxy

SPEC = VersionSpec(source=Source.HUGGING_FACE, huggingface_repo_id="org/one")


@pytest.fixture
def proxy() -> Iterator[RecordingProxy]:
    with recording_proxy() as made:
        yield made


@pytest.fixture
def hub(model: bytes) -> Iterator[FakeHub]:
    """One whose every answer is at the address that was asked."""
    with fake_hub() as made:
        made.repos["org/one"] = {"one.gguf": model}
        yield made


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


async def download(cache: Path) -> None:
    """Both that we ask a Hub for: a header's facts, and the whole file."""
    assert (await profile(SPEC)).layers
    await fetch(SPEC, cache, token=None, progress=lambda percent: None)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "socks"])
async def test_downloads_go_through_the_proxy_which_resolves_the_name(
    variable: str, hub: FakeHub, proxy: RecordingProxy, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, name = ("socks5", "ALL_PROXY") if variable == "socks" else ("http", variable)
    monkeypatch.setenv(name, f"{scheme}://{proxy.at}")
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    proxy.routes["hub.invalid"] = int(hub.url.rpartition(":")[2])
    await download(cache)
    assert set(proxy.asked) == {"hub.invalid:80"}
    assert hub.requests


async def test_https_goes_through_a_tunnel_with_the_proxys_password(
    model: bytes, proxy: RecordingProxy, cache: Path, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    certificate = issue(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.certfile))
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:pass@{proxy.at}")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with fake_hub(certificate) as hub:
        hub.repos["org/one"] = {"one.gguf": model}
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        await download(cache)
    assert set(proxy.asked) == {hub.url.removeprefix("https://")}
    assert set(proxy.credentials) == {f"Basic {base64.b64encode(b'me:pass').decode()}"}


@pytest.mark.parametrize("exceptions", ["127.0.0.1", "10.0.0.0/8, 127.0.0.0/8", "*"])
async def test_exceptions_are_called_directly(
    exceptions: str, hub: FakeHub, proxy: RecordingProxy, cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HTTP_PROXY", f"http://{proxy.at}")
    monkeypatch.setenv("ALL_PROXY", f"http://{proxy.at}")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("NO_PROXY", exceptions)
    await download(cache)
    assert proxy.asked == []
    monkeypatch.setenv("NO_PROXY", "127.0.0.2,example.com")
    await profile(SPEC)
    assert proxy.asked


@pytest.mark.parametrize("wrong", ["ftp://proxy:1", "http://:8123", "http://[::1:secret", "://x"])
async def test_what_names_no_proxy_is_said_and_not_quoted(
    wrong: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", wrong)
    with pytest.raises(Invalid, match="variable HTTPS_PROXY names no proxy: want") as caught:
        await download(cache)
    assert wrong not in str(caught.value)


async def test_a_mirrors_password_is_sent_and_never_shown(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("//", "//me:pass-word@"))
    await download(cache)
    assert all("Basic " in str(token) for token in hub.tokens)
    hub.listing = b"nonsense"
    with pytest.raises(Unavailable, match=f"{hub.url} does not speak") as caught:
        await profile(SPEC)
    assert "pass-word" not in str(caught.value)
    monkeypatch.setenv("HF_ENDPOINT", "ftp://me:pass-word@x")
    with pytest.raises(Invalid, match="'ftp://x' is no address") as refused:
        await profile(SPEC)
    assert "pass-word" not in str(refused.value)


SAID = {"http": "h", "https": "s", "all": "a"}


@pytest.mark.parametrize(
    ("scheme", "host", "port", "no", "wanted"),
    [
        ("http", "x.org", None, "", "h"),
        ("https", "x.org", None, "", "s"),
        ("https", "x.org", None, "y.org", "s"),
        ("https", "x.org", None, "a, x.org ,b", None),
        ("https", "X.org", None, "x.ORG", None),
        ("https", "a.x.org", None, "x.org", None),
        ("https", "a.x.org", None, ".x.org", None),
        ("https", "x.org", None, "*.x.org", None),
        ("https", "notx.org", None, "x.org", "s"),
        ("https", "x.org", None, "x.org:443", None),
        ("https", "x.org", None, "x.org:80", "s"),
        ("https", "x.org", 8443, "x.org:8443", None),
        ("http", "10.1.2.3", None, "10.0.0.0/8", None),
        ("http", "11.1.2.3", None, "10.0.0.0/8", "h"),
        ("http", "10.1.2.3", None, "10.0.0.0/8:81", "h"),
        ("http", "::1", None, "::1", None),
        ("http", "::1", 80, "[::1]:80", None),
        ("http", "fd00::1", None, "fd00::/8", None),
        ("http", "10.1.2.3", None, "2.3", "h"),
        ("http", "localhost", None, "127.0.0.1", "h"),
        ("http", "anything", None, "*", None),
        ("http", "x.org", None, ",,.", "h"),
    ],
)
def test_which_proxy_is_for_an_address(
    scheme: str, host: str, port: int | None, no: str, wanted: str | None
) -> None:
    assert proxy_for(scheme, host, port, SAID | {"no": no}) == wanted


def test_all_proxy_stands_for_those_that_are_not_named() -> None:
    assert proxy_for("https", "x.org", None, {"all": "a", "http": "h"}) == "a"
    assert proxy_for("https", "x.org", None, {"http": "h"}) is None
