"""A browser logs in and out with a real SAML identity provider, through a real node."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import httpx
import pytest

from tests.e2e.conftest import MakeNode
from tests.support.node import Node
from tests.support.ports import free_ports
from tests.support.saml_messages import pair
from tests.support.wait import soon

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("xmlsec1") is None, reason="needs the program xmlsec1: apt install xmlsec1"
    ),
]


class Form(HTMLParser):
    """The first form of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.action, self.fields = "", dict[str, str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = {name: value or "" for name, value in attrs}
        if tag == "form":
            self.action = said["action"]
        elif tag == "input" and "name" in said:
            self.fields[said["name"]] = said.get("value", "")


class Browser:
    """It follows redirects and submits forms, and sends SameSite=Lax cookies as browsers do.

    Hosts are sites here: 127.0.0.1 is the server, localhost the identity provider.
    """

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def get(self, url: str) -> httpx.Response:
        return self._follow(self._http.get(url), url)

    def submit(self, page: httpx.Response, **fields: str) -> httpx.Response:
        """Fill in the form of a page, and send it."""
        form = Form(page.text)
        url = urljoin(str(page.url), form.action)
        origin = f"{page.url.scheme}://{page.url.netloc.decode()}"
        request = self._http.build_request(
            "POST", url, data=form.fields | fields, headers={"Origin": origin}
        )
        if urlsplit(url).hostname != page.url.host:
            request.headers.pop("Cookie", None)
        return self._follow(self._http.send(request), url)

    def post(self, url: str) -> httpx.Response:
        """As a script of the page there does."""
        return self._http.post(url)

    def _follow(self, answer: httpx.Response, url: str) -> httpx.Response:
        for _ in range(10):
            if not answer.is_redirect:
                return answer
            url = urljoin(url, answer.headers["location"])
            answer = self._http.get(url)
        raise AssertionError(f"redirected for ever: {url}")


MakeBrowser = Callable[[], Browser]


@pytest.fixture
def open_browser() -> Iterator[MakeBrowser]:
    """New browsers, which are closed after the test."""
    with ExitStack() as stack:

        def another() -> Browser:
            http = httpx.Client(timeout=30, trust_env=False)
            return Browser(stack.enter_context(http))

        yield another


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "encrypted"])
def node(
    request: pytest.FixtureRequest, make_node: MakeNode, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Node]:
    """A node, and an identity provider that knows it by its metadata."""
    place, port = tmp_path_factory.mktemp("idp"), free_ports(1)
    files = {}
    for name in ("idp", "sp"):
        made = pair(name)
        files[name] = (place / f"{name}.key", place / f"{name}.crt")
        files[name][0].write_text(made.key)
        files[name][1].write_text(made.certificate)
    node = make_node("--disable-worker", "--force-auth-localhost")
    idp = f"http://localhost:{port}"
    node.arguments += [
        "--saml-idp-server-url", f"{idp}/sso",
        "--saml-idp-logout-url", f"{idp}/slo",
        "--saml-idp-entity-id", f"{idp}/metadata",
        "--saml-idp-x509-cert", str(files["idp"][1]),
        "--saml-sp-entity-id", f"{node.url}/auth/saml/metadata",
        "--saml-sp-acs-url", f"{node.url}/auth/saml/callback",
        "--saml-sp-x509-cert", str(files["sp"][1]),
        "--saml-sp-private-key", str(files["sp"][0]),
        "--external-auth-name", "mail",
        "--external-auth-full-name", "givenName+sn",
    ]  # fmt: skip
    node.start()
    given = {
        "port": port,
        "key": str(files["idp"][0]),
        "certificate": str(files["idp"][1]),
        "sp": f"{node.url}/auth/saml/metadata",
        "encrypt": request.param,
    }
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.saml_idp", json.dumps(given)],
            stdout=log, stderr=log, cwd=Path(__file__).parents[2],
        )  # fmt: skip
    try:
        soon(
            lambda: _listens(process, port, place / "log"),
            "the identity provider listens",
            within_s=60,
        )
        node.environment["IDP"] = idp
        yield node
    finally:
        process.kill()
        process.wait()


def _listens(process: "subprocess.Popen[bytes]", port: int, log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def login(node: Node, browser: Browser, who: str) -> httpx.Response:
    page = browser.get(f"{node.url}/auth/saml/login")
    if "who" in Form(page.text).fields:
        page = browser.submit(page, who=who)
    assert Form(page.text).action == f"{node.url}/auth/saml/callback", page.text
    return browser.submit(page)


def username(node: Node, browser: Browser) -> str | None:
    answer = browser.get(f"{node.url}/v2/users/me")
    return answer.json()["username"] if answer.is_success else None


def test_a_browser_logs_in_with_a_real_identity_provider(
    node: Node, open_browser: MakeBrowser
) -> None:
    browser, another = open_browser(), open_browser()
    assert browser.get(f"{node.url}/auth/config").json()["is_saml"]
    done = login(node, browser, "alice")
    assert str(done.url) == f"{node.url}/", node.log.read_text()
    me = browser.get(f"{node.url}/v2/users/me").json()
    assert (me["username"], me["full_name"]) == ("alice@example.org", "Alice Liddell")
    login(node, another, "bob")
    assert username(node, another) == "bob@example.org"
    assert username(node, browser) == "alice@example.org"
    # The identity provider remembers the browser: nobody is asked again.
    login(node, browser, "nobody")
    again = browser.get(f"{node.url}/v2/users/me").json()
    assert again["id"] == me["id"]


def test_an_answer_that_another_browser_brings_opens_nothing(
    node: Node, open_browser: MakeBrowser
) -> None:
    attacker, victim = open_browser(), open_browser()
    page = attacker.submit(attacker.get(f"{node.url}/auth/saml/login"), who="alice")
    refused = victim.submit(page)
    assert refused.status_code == 403
    assert "this browser has not begun this login" in refused.text
    assert username(node, victim) is None


def test_the_identity_provider_logs_its_users_out_here(
    node: Node, open_browser: MakeBrowser
) -> None:
    browser, other = open_browser(), open_browser()
    idp = node.environment["IDP"]
    login(node, browser, "alice")
    login(node, other, "bob")
    back = browser.get(f"{idp}/logout")
    assert back.text == "/slo: out"
    assert username(node, browser) is None
    assert username(node, other) == "bob@example.org"


def test_a_logout_here_is_one_at_the_identity_provider(
    node: Node, open_browser: MakeBrowser
) -> None:
    browser = open_browser()
    idp = node.environment["IDP"]
    login(node, browser, "alice")
    assert browser.get(f"{idp}/me").text == "alice"
    back = browser.get(browser.post(f"{node.url}/auth/logout").json()["logout_url"])
    assert str(back.url) == f"{node.url}/"
    assert browser.get(f"{idp}/me").text == ""
    assert username(node, browser) is None
