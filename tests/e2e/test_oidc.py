"""A person's browser, a real OpenID provider and a real node."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import MakeNode
from tests.support.node import Node
from tests.support.real_oidc import CLIENT, SECRET, real_oidc, submit

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def provider(
    make_node: MakeNode, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Node, str]]:
    """A node that knows a provider, and that provider's issuer."""
    node = make_node("--disable-worker", "--force-auth-localhost")
    with real_oidc(node.url, tmp_path_factory.mktemp("provider") / "log") as issuer:
        node.arguments += ["--oidc-issuer", issuer, "--oidc-client-id", CLIENT]
        node.arguments += ["--server-external-url", node.url]
        node.environment["GPUSTACK_OIDC_CLIENT_SECRET"] = SECRET
        yield node.start(), issuer


@pytest.fixture
def browser(provider: tuple[Node, str]) -> Iterator[httpx.Client]:
    node, _ = provider
    headers = {"Accept": "text/html,*/*"}
    with node.http(None, follow_redirects=True) as http:
        http.headers.update(headers)
        yield http


def log_in(browser: httpx.Client, name: str) -> httpx.Response:
    """To the provider, through its pages, and back."""
    page = browser.get("/auth/oidc/login")
    assert "/interaction/" in page.url.path, page.text
    page = submit(browser, page, login=name, password="any")  # its login
    return submit(browser, page)  # its consent


def test_a_person_logs_in_by_way_of_the_provider_and_out_of_both(
    provider: tuple[Node, str], browser: httpx.Client
) -> None:
    node, issuer = provider
    assert browser.get("/auth/config").json()["is_oidc"] is True
    assert browser.get("/v2/users/me").status_code == 401
    back = log_in(browser, "alice")
    assert str(back.url) == f"{node.url}/"
    me = browser.get("/v2/users/me").json()
    assert (me["username"], me["source"], me["is_admin"]) == ("alice", "oidc", False)
    finish = next(one for one in back.history if one.url.path == "/auth/oidc/callback")
    assert browser.get(finish.url).status_code == 401  # by the same code and state

    answer = browser.post("/auth/logout", headers={"Origin": node.url})
    assert browser.get("/v2/users/me").status_code == 401
    page = browser.get(answer.json()["logout_url"])
    assert str(page.url).startswith(issuer)
    back = submit(browser, page)  # whether to log out there too
    assert str(back.url) == f"{node.url}/"
    page = browser.get("/auth/oidc/login")
    assert "/interaction/" in page.url.path  # it asks who it is


def test_whoever_is_logged_in_there_comes_in_at_once_as_the_same_user(
    provider: tuple[Node, str], browser: httpx.Client
) -> None:
    node, _ = provider
    log_in(browser, "bob")
    first = browser.get("/v2/users/me").json()
    browser.cookies.delete("gpustack_session")
    assert browser.get("/v2/users/me").status_code == 401
    assert str(browser.get("/auth/oidc/login").url) == f"{node.url}/"
    assert browser.get("/v2/users/me").json() == first


def test_userinfo_says_what_the_id_token_does_not(
    provider: tuple[Node, str], browser: httpx.Client
) -> None:
    node, _ = provider
    log_in(browser, "carol")
    plain = browser.get("/v2/users/me").json()
    assert (plain["username"], plain["full_name"]) == ("carol", None)
    assert node.stop() == 0
    node.arguments += ["--oidc-use-userinfo"]
    node.start()
    browser.get("/auth/oidc/login")
    me = browser.get("/v2/users/me").json()
    assert (me["id"], me["username"]) == (plain["id"], "carol")  # a name is for good
    assert (me["full_name"], me["avatar_url"]) == ("User carol", "https://id.example/carol.png")
    with node.http(None, follow_redirects=True) as other:
        log_in(other, "dave")
        assert other.get("/v2/users/me").json()["username"] == "dave.there"


def test_a_stranger_who_comes_from_nowhere_reads_a_page(browser: httpx.Client) -> None:
    answer = browser.get("/auth/oidc/callback?code=x&state=y")
    assert (answer.status_code, answer.headers["content-type"]) == (401, "text/html; charset=utf-8")
    assert "begin again at" in answer.text


def test_neither_secrets_nor_tokens_are_anywhere_to_be_read(
    provider: tuple[Node, str], browser: httpx.Client
) -> None:
    node, _ = provider
    back = log_in(browser, "erin")
    codes = [one.url.params["code"] for one in back.history if "code" in one.url.params]
    assert len(codes) == 1
    logs = [node.log, *(path for path in node.log_dir.rglob("*") if path.is_file())]
    texts = [path.read_text(errors="replace") for path in logs]
    texts += [Path(f"/proc/{pid}/cmdline").read_text() for pid in node.pids()]
    with node.http() as admin:
        texts += [admin.get(path).text for path in ("/v2/settings", "/v2/audit")]
    assert "a login from" in "".join(texts)  # the logs are there
    for secret in (SECRET, *codes, "eyJ"):
        assert not [text for text in texts if secret in text]
