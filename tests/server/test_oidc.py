"""OpenID Connect: who gets in by it, and who does not, whatever a provider or a stranger says.

What it does with the database is test_external.py's: one kind is enough here.
"""

import base64
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlsplit

import httpx
import pytest
from sqlmodel import select

from gpustack.config.load import load
from gpustack.errors import Unavailable
from gpustack.schemas import wire
from gpustack.server.auth.oidc import Provider, is_safe
from gpustack.server.db.tables import Credential
from tests.server.conftest import Plane, Start
from tests.support.databases import KINDS, Databases
from tests.support.fake_oidc import (
    ACCESS,
    CLIENT,
    SECRET,
    FakeOidc,
    Make,
    at_hash,
    ec_key,
    fake_oidc,
    rsa_key,
    signed,
)

HOME = "http://test"
CALLBACK = f"{HOME}/auth/oidc/callback"
LOGIN = "/auth/oidc/login"


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    with KINDS["sqlite"](tmp_path_factory.mktemp("sqlite")) as made:
        yield made


@pytest.fixture
def fake() -> Iterator[FakeOidc]:
    with fake_oidc() as provider:
        yield provider


def options(fake: FakeOidc, **more: str) -> dict[str, str]:
    return {
        "oidc_issuer": fake.url,
        "oidc_client_id": CLIENT,
        "oidc_client_secret": SECRET,
        "server_external_url": HOME,
    } | more


@pytest.fixture
async def plane(start: Start, tmp_path: Path, fake: FakeOidc) -> Plane:
    return await start(tmp_path, **options(fake))


async def sent(browser: httpx.AsyncClient) -> str:
    """Where the browser is sent to log in."""
    answer = await browser.get(LOGIN)
    assert answer.status_code == 302, answer.text
    return answer.headers["location"]


async def come_back(plane: Plane, fake: FakeOidc, **more: str) -> httpx.Response:
    browser = await plane.through_gateway()
    return await browser.get(fake.send_back(await sent(browser), **more))


async def no_sessions(plane: Plane) -> bool:
    async with plane.db.read() as session:
        found = await session.exec(select(Credential).where(Credential.kind == "session"))
        return not found.all()


def coded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def unsigned(claims: dict[str, Any], algorithm: str = "none") -> str:
    parts = ({"alg": algorithm, "kid": "one"}, claims)
    return "".join(f"{coded(json.dumps(part).encode())}." for part in parts)


def confused(claims: dict[str, Any], how: str) -> str:
    """As if the public key were a secret that both share."""
    public = rsa_key("one")
    secret = public.as_pem(private=False) if how == "pem" else json.dumps(public.as_dict()).encode()
    begin = unsigned(claims, "HS256").removesuffix(".")
    return f"{begin}.{coded(hmac.digest(secret, begin.encode(), 'sha256'))}"


def tampered(claims: dict[str, Any]) -> str:
    head, _, signature = signed(claims, rsa_key("one")).split(".")
    return ".".join((head, unsigned(claims | {"sub": "admin"}).split(".")[1], signature))


def right(claims: dict[str, Any]) -> str:
    return signed(claims, rsa_key("one"))


# --- the way in --------------------------------------------------------------------------------


async def test_who_logged_in_there_is_logged_in_here(plane: Plane, fake: FakeOidc) -> None:
    browser = await plane.through_gateway()
    assert (await browser.get("/auth/config")).json()["is_oidc"] is True
    location = await sent(browser)
    asked = parse_qs(urlsplit(location).query)
    assert location.startswith(f"{fake.url}/authorize?")
    assert asked["scope"] == ["openid profile email"]
    assert (asked["redirect_uri"], asked["code_challenge_method"]) == ([CALLBACK], ["S256"])
    answer = await browser.get(fake.send_back(location))
    assert (answer.status_code, answer.headers["location"]) == (302, "/")
    me = (await browser.get("/v2/users/me")).json()
    assert (me["username"], me["source"], me["is_admin"]) == ("alice", "oidc", False)
    session, over = answer.headers.get_list("set-cookie")
    assert session.startswith("gpustack_session=")
    assert {*session.split("; ")[1:]} == {"HttpOnly", "Max-Age=7200", "Path=/", "SameSite=lax"}
    assert over.startswith('gpustack_login=""; HttpOnly; Max-Age=0; Path=/auth; ')


async def test_every_login_has_secrets_of_its_own_and_a_cookie_that_binds_them(
    plane: Plane,
) -> None:
    browser = await plane.through_gateway(**{wire.SCHEME_HEADER: "https"})
    answers = [await browser.get(LOGIN) for _ in range(2)]
    said = [parse_qs(urlsplit(one.headers["location"]).query) for one in answers]
    for name in ("state", "nonce", "code_challenge"):
        assert said[0][name] != said[1][name]
        assert len(said[0][name][0]) >= 43
    _, *marks = answers[0].headers["set-cookie"].split("; ")
    assert {*marks} == {"HttpOnly", "Max-Age=600", "Path=/auth", "SameSite=lax", "Secure"}


async def test_another_server_may_finish_a_login(
    start: Start, tmp_path: Path, fake: FakeOidc
) -> None:
    planes = [await start(tmp_path / name, **options(fake)) for name in "ab"]
    browsers = [await plane.through_gateway() for plane in planes]
    back = fake.send_back(await sent(browsers[0]))
    browsers[1].cookies = browsers[0].cookies
    assert (await browsers[1].get(back)).headers["location"] == "/"


GOOD: dict[str, tuple[Make, dict[str, Any]]] = {
    "by RSA": (lambda c: signed(c, rsa_key("one")), {}),
    "by an elliptic curve": (lambda c: signed(c, ec_key("two"), "ES256"), {}),
    "without the key's name": (lambda c: signed(c, rsa_key("one"), kid=None), {}),
    "with its key's certificates": (
        lambda c: signed(c, rsa_key("one"), x5c=["A" * 1900] * 3),
        {},
    ),
    "two audiences": (right, {"aud": [CLIENT, "other"], "azp": CLIENT}),
    "a list of one audience, no hash": (right, {"aud": [CLIENT], "at_hash": None}),
    "valid since then": (right, {"nbf": 0, "exp": 10**11}),
}


async def test_a_right_token_lets_in(plane: Plane, fake: FakeOidc) -> None:
    statuses = {}
    for name, (fake.make, fake.claims) in GOOD.items():
        statuses[name] = (await come_back(plane, fake)).status_code
    assert statuses == dict.fromkeys(GOOD, 302)


async def test_a_new_key_of_the_provider_is_looked_for_once(plane: Plane, fake: FakeOidc) -> None:
    assert (await come_back(plane, fake)).status_code == 302
    assert fake.asked.count("GET /jwks") == 1
    fake.keys, fake.make = [rsa_key("new")], lambda claims: signed(claims, rsa_key("new"))
    assert (await come_back(plane, fake)).status_code == 302
    fake.make = lambda claims: signed(claims, rsa_key("stranger's"))
    assert (await come_back(plane, fake)).status_code == 401
    assert fake.asked.count("GET /jwks") == 3


async def test_the_client_is_known_as_the_provider_wants(plane: Plane, fake: FakeOidc) -> None:
    fake.document = {"token_endpoint_auth_methods_supported": ["client_secret_post"]}
    assert (await come_back(plane, fake)).status_code == 302
    assert (fake.form["client_secret"], fake.authorization) == (SECRET, None)


async def test_an_issuer_may_end_in_a_slash(start: Start, tmp_path: Path, fake: FakeOidc) -> None:
    """Options that are URLs lose it."""
    fake.document = fake.claims = {"iss": f"{fake.url}/", "issuer": f"{fake.url}/"}
    plane = await start(tmp_path, **options(fake, oidc_issuer=f"{fake.url}/"))
    assert (await come_back(plane, fake)).status_code == 302


# --- attributes --------------------------------------------------------------------------------


async def test_attributes_come_from_the_claims_that_options_name(
    start: Start, tmp_path: Path, fake: FakeOidc
) -> None:
    names = {"external_auth_name": "upn", "external_auth_full_name": "given_name+family_name"}
    plane = await start(tmp_path, **options(fake, **names))
    refused = await come_back(plane, fake)
    assert refused.status_code == 403
    assert "sent no upn, which --external-auth-name asks for" in refused.json()["message"]
    fake.claims = {"upn": "al", "given_name": "Al", "family_name": "Bo"}
    assert (await come_back(plane, fake)).status_code == 302
    users = (await (await plane.admin()).get("/v2/users")).json()["items"]
    assert [(one["username"], one["full_name"]) for one in users[1:]] == [("al", "Al Bo")]


async def test_userinfo_is_of_the_one_who_logged_in(
    start: Start, tmp_path: Path, fake: FakeOidc
) -> None:
    plane = await start(tmp_path, **options(fake, oidc_use_userinfo="true"))
    fake.userinfo = {"sub": "s2", "preferred_username": "bob"}
    refused = await come_back(plane, fake)
    assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
    fake.userinfo["sub"] = "s1"
    assert (await come_back(plane, fake)).status_code == 302
    users = (await (await plane.admin()).get("/v2/users")).json()["items"]
    assert [one["username"] for one in users[1:]] == ["bob"]


# --- who does not get in -----------------------------------------------------------------------


now = int(time.time())
BAD: dict[str, tuple[Make, dict[str, Any]]] = {
    "no signature": (unsigned, {}),
    "no signature in other letters": (lambda c: unsigned(c, "nOnE"), {}),
    "another's signature": (tampered, {}),
    "the public key as a secret": (lambda c: confused(c, "pem"), {}),
    "the public JWK as a secret": (lambda c: confused(c, "jwk"), {}),
    "a key that is not the provider's": (lambda c: signed(c, rsa_key("x")), {}),
    "such a key under a known name": (lambda c: signed(c, rsa_key("x"), kid="one"), {}),
    "such a key without a name": (lambda c: signed(c, rsa_key("x"), kid=None), {}),
    "a key in the token itself": (
        lambda c: signed(c, rsa_key("x"), kid="one", jwk=rsa_key("x").as_dict(private=False)),
        {},
    ),
    "a key of another type": (lambda c: signed(c, ec_key("two"), "ES256", kid="one"), {}),
    "an algorithm that was not announced": (lambda c: signed(c, rsa_key("one"), "RS512"), {}),
    "no token": (lambda _: "a.b", {}),
    "no claims": (lambda _: signed("[]", rsa_key("one")), {}),
    "claims that go too deep": (lambda _: signed("[" * 5_000, rsa_key("one")), {}),
    "another issuer": (right, {"iss": "http://127.0.0.1:1"}),
    "no issuer": (right, {"iss": None}),
    "another audience": (right, {"aud": "other"}),
    "another audience, by this client": (right, {"aud": "other", "azp": CLIENT}),
    "other audiences": (right, {"aud": ["other", "gpustack2"]}),
    "no audience": (right, {"aud": None}),
    "another authorized party": (right, {"azp": "other"}),
    "several audiences, no authorized party": (right, {"aud": [CLIENT, "other"]}),
    "another nonce": (right, {"nonce": "0" * 64}),
    "no nonce": (right, {"nonce": None}),
    "expired": (right, {"exp": now - 120}),
    "no end": (right, {"exp": None}),
    "an end that is no number": (right, {"exp": "9999999999"}),
    "not yet valid": (right, {"nbf": now + 600}),
    "of the future": (right, {"iat": now + 600}),
    "another access token's hash": (right, {"at_hash": at_hash("other")}),
    "a hash that is none": (right, {"at_hash": 7}),
    "no subject": (right, {"sub": None}),
    "a subject that is no text": (right, {"sub": 1}),
}


async def test_a_bad_token_lets_nobody_in(
    plane: Plane, fake: FakeOidc, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("gpustack", "httpx", "httpcore"):
        caplog.set_level(logging.DEBUG, name)
    answers = {}
    for name, (fake.make, fake.claims) in BAD.items():
        answers[name] = answer = await come_back(plane, fake)
        assert "set-cookie" not in answer.headers, name
    assert {name: one.status_code for name, one in answers.items()} == dict.fromkeys(BAD, 401)
    (message,) = {answer.json()["message"] for answer in answers.values()}
    assert message.startswith("what the identity provider answered cannot be trusted: begin again")
    assert await no_sessions(plane)
    assert caplog.text.count("is refused: of its ID token: ") == len(BAD)
    assert not [one for one in (SECRET, ACCESS, "eyJ") if one in caplog.text + message]


async def test_a_token_is_signed_by_a_key_that_is_for_signing(plane: Plane, fake: FakeOidc) -> None:
    key = rsa_key("one").as_dict(private=False) | {"use": "enc"}
    fake.answers["/jwks"] = (200, json.dumps({"keys": [key]}).encode())
    assert (await come_back(plane, fake)).status_code == 401
    assert await no_sessions(plane)


NOT_BEGUN = f"this login did not begin in this browser, or too long ago: begin again at {HOME}/"


async def test_a_state_that_is_not_this_browsers_lets_nobody_in(
    plane: Plane, fake: FakeOidc
) -> None:
    for state in ("0" * 64, ""):
        answer = await come_back(plane, fake, state=state)
        assert answer.status_code == 401
        assert answer.json()["message"].startswith(NOT_BEGUN)
    assert not [one for one in fake.asked if one.startswith("POST")]  # nobody was asked


async def test_what_another_browser_began_cannot_be_finished(plane: Plane, fake: FakeOidc) -> None:
    """Else whoever has an account could have others log in to it."""
    mine, other = await plane.through_gateway(), await plane.through_gateway()
    back = fake.send_back(await sent(mine))
    await sent(other)
    for browser in (other, await plane.through_gateway()):
        answer = await browser.get(back)
        assert answer.json()["message"].startswith(NOT_BEGUN)
    assert (await mine.get(back)).status_code == 302


async def test_a_code_opens_one_session(plane: Plane, fake: FakeOidc) -> None:
    browser = await plane.through_gateway()
    back = fake.send_back(await sent(browser))
    cookies = httpx.Cookies(browser.cookies)
    assert (await browser.get(back)).status_code == 302
    again = await browser.get(back)  # the cookie is gone
    assert again.json()["message"].startswith(NOT_BEGUN)
    thief = await plane.through_gateway()
    thief.cookies = cookies
    answer = await thief.get(back)
    assert answer.status_code == 401
    assert answer.json()["message"].startswith("this login was finished already, or took too long")
    assert wire.SESSION_COOKIE not in thief.cookies


async def test_an_answer_of_another_provider_is_not_taken_for_this_ones(
    plane: Plane, fake: FakeOidc
) -> None:
    refused = await come_back(plane, fake, iss="https://other.example")
    assert refused.status_code == 401
    assert (await come_back(plane, fake, iss=fake.url)).status_code == 302


async def test_a_provider_that_always_says_who_it_is_must(plane: Plane, fake: FakeOidc) -> None:
    fake.document = {"authorization_response_iss_parameter_supported": True}
    assert (await come_back(plane, fake)).status_code == 401
    assert (await come_back(plane, fake, iss=fake.url)).status_code == 302


async def test_a_refusal_there_is_a_sentence_here(plane: Plane, fake: FakeOidc) -> None:
    for error, shown in (("access_denied", "access_denied"), ("<b>x</b>", "error")):
        answer = await come_back(plane, fake, error=error)
        assert answer.status_code == 403
        begin = f"the identity provider did not let you in ({shown}): begin again at {HOME}/"
        assert answer.json()["message"].startswith(begin)
    assert (await come_back(plane, fake, code="")).status_code == 401  # nor is there a reason


async def test_a_disabled_user_reads_so(plane: Plane, fake: FakeOidc) -> None:
    assert (await come_back(plane, fake)).status_code == 302
    body = {"username": "alice", "is_admin": False, "is_active": False}
    assert (await (await plane.admin()).put("/v2/users/2", json=body)).status_code == 200
    answer = await come_back(plane, fake)
    told = (answer.status_code, answer.json()["message"])
    assert told == (403, "this user is disabled: ask an administrator")


async def test_a_browser_gets_a_page(plane: Plane, fake: FakeOidc) -> None:
    browser = await plane.through_gateway(Accept="text/html,*/*;q=0.8")
    answer = await browser.get(f"{CALLBACK}?state=<script>")
    assert answer.status_code == 401
    assert answer.headers["content-type"].startswith("text/html")
    assert NOT_BEGUN in answer.text
    assert '<a href="/">' in answer.text
    assert "<script>" not in answer.text
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    fake.answers["/.well-known/openid-configuration"] = (500, b"")
    answer = await browser.get(LOGIN)
    assert (answer.status_code, "the server&#x27;s log" in answer.text) == (503, True)


# --- a provider that cannot be used ------------------------------------------------------------

AWAY = "the identity provider does not answer as it should: try again in a moment"


async def whole_login(it: Provider, fake: FakeOidc) -> None:
    back = fake.send_back(await it.login_url("secret"))
    await it.logged_in(dict(parse_qsl(urlsplit(back).query)), "secret")


@asynccontextmanager
async def provider(
    fake: FakeOidc, call_s: float = 30, whole_s: float = 60
) -> AsyncIterator[Provider]:
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
        yield Provider(load(options(fake), {}).settings, http, call_s, whole_s)


@pytest.mark.parametrize(
    ("document", "why"),
    [
        ({"issuer": "https://other.example"}, "it calls itself 'https://other.example'"),
        ({"token_endpoint": "http://id.example/token"}, "its token_endpoint is 'http://id.ex"),
        ({"jwks_uri": "https://a\u0000b/"}, "/) cannot be used: "),
        ({"jwks_uri": None}, "its jwks_uri is 'None': want an https URL"),
        ({"authorization_endpoint": ["x"]}, "its authorization_endpoint is"),
        ({"end_session_endpoint": "javascript:x"}, "its end_session_endpoint is"),
    ],
)
async def test_a_provider_that_is_not_what_it_should_be_is_not_used(
    fake: FakeOidc, document: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    fake.document = document
    async with provider(fake) as it:
        with pytest.raises(Unavailable, match=AWAY):
            await it.login_url("secret")
    assert why in caplog.text


@pytest.mark.parametrize(
    ("path", "answer", "why"),
    [
        ("/.well-known/openid-configuration", (404, b"{}"), "it answers 404"),
        ("/.well-known/openid-configuration", (302, b""), "it answers 302"),
        ("/jwks", (200, b"<html>"), "it answers 200 and no JSON"),
        ("/jwks", (200, b"[]"), "no JSON object"),
        ("/jwks", (200, b"{}"), "it answers no keys"),
        ("/jwks", (200, b'{"keys": "' + b"x" * 2**20), "its answer is too long"),
        ("/token", (500, b"oops"), "it answers 500 and no JSON"),
        ("/token", (400, b'{"error": "x"}'), "refused a code: 'x'"),
    ],
)
async def test_nonsense_of_a_provider_is_a_sentence(
    fake: FakeOidc,
    path: str,
    answer: tuple[int, bytes],
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake.answers[path] = answer
    async with provider(fake) as it:
        with pytest.raises(Unavailable, match=AWAY):
            await whole_login(it, fake)
    assert why in caplog.text


async def test_a_provider_that_does_not_know_this_server_is_the_administrators_business(
    start: Start, tmp_path: Path, fake: FakeOidc
) -> None:
    plane = await start(tmp_path, **options(fake, oidc_client_secret="hunter2"))
    answer = await come_back(plane, fake)
    assert answer.status_code == 403
    assert "check --oidc-client-id and --oidc-client-secret" in answer.json()["message"]
    assert "hunter2" not in answer.text


async def test_a_provider_that_is_away_is_a_sentence_and_soon_back(
    start: Start, tmp_path: Path
) -> None:
    with fake_oidc() as fake:
        plane = await start(tmp_path, **options(fake))
    answer = await (await plane.client()).get(LOGIN)
    assert answer.status_code == 503
    assert answer.json()["message"].startswith(AWAY)


async def test_a_provider_that_says_nothing_is_not_waited_for(
    fake: FakeOidc, caplog: pytest.LogCaptureFixture
) -> None:
    fake.hangs = {"/.well-known/openid-configuration"}
    async with provider(fake, call_s=0.5) as it:
        with pytest.raises(Unavailable, match=AWAY):
            await it.login_url("secret")
    assert "it does not answer within 0.5 s" in caplog.text


@pytest.mark.parametrize("path", ["/token", "/userinfo", "/jwks"])
async def test_no_browser_waits_for_longer_than_its_gateway(
    fake: FakeOidc, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Which would say that the server does not answer."""
    async with provider(fake) as it:
        back = fake.send_back(await it.login_url("secret"))
    fake.hangs = {path}
    said = dict(parse_qsl(urlsplit(back).query))
    more = options(fake, oidc_use_userinfo="true")
    async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
        it = Provider(load(more, {}).settings, http, 60, whole_s=0.5)
        with pytest.raises(Unavailable, match=AWAY):
            await it.logged_in(said, "secret")
        assert "longer than 0.5 s together" in caplog.text
        fake.hangs = {"/jwks"}
        it = Provider(load(more, {}).settings, http, 60, whole_s=0.5)
        assert await it.logout_url({"issuer": fake.url}) is None
    assert caplog.text.count("longer than 0.5 s together") == 2


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("https://id.example/x", True),
        ("http://127.0.0.1:1", True),
        ("http://[::1]/", True),
        ("http://id.example", False),
        ("http://127.0.0.1.example", False),
        ("https://", False),
        ("https://[x", False),
        ("https://id.example:99999", False),
        ("file:///etc/passwd", False),
        (None, False),
    ],
)
def test_what_can_be_called_safely(url: object, safe: bool) -> None:
    assert is_safe(url) == safe


# --- out again ---------------------------------------------------------------------------------


async def logged_in(plane: Plane, fake: FakeOidc) -> httpx.AsyncClient:
    browser = await plane.through_gateway()
    assert (await browser.get(fake.send_back(await sent(browser)))).status_code == 302
    return browser


async def test_a_logout_says_where_the_providers_session_ends(plane: Plane, fake: FakeOidc) -> None:
    browser = await logged_in(plane, fake)
    answer = await browser.post("/auth/logout")
    assert (answer.status_code, "Max-Age=0" in answer.headers["set-cookie"]) == (200, True)
    where, _, query = answer.json()["logout_url"].partition("?")
    assert where == f"{fake.url}/logout"
    said = {"client_id": [CLIENT], "post_logout_redirect_uri": [f"{HOME}/"]}
    assert parse_qs(query) == said  # and no token
    assert await no_sessions(plane)


async def test_a_logout_ends_the_session_here_whatever_the_provider_does(
    start: Start, tmp_path: Path, fake: FakeOidc
) -> None:
    fake.document = {"end_session_endpoint": None}
    plane = await start(tmp_path, **options(fake))
    assert (await (await logged_in(plane, fake)).post("/auth/logout")).status_code == 204
    with fake_oidc() as other:  # which knows nothing of a session
        later = await start(tmp_path, **options(other))
        await log_out_at(later, await logged_in(plane, fake))
    gone = await start(tmp_path, **options(other))
    await log_out_at(gone, await logged_in(plane, fake))
    assert await no_sessions(plane)


async def log_out_at(plane: Plane, browser: httpx.AsyncClient) -> None:
    elsewhere = await plane.through_gateway()
    elsewhere.cookies = browser.cookies
    assert (await elsewhere.post("/auth/logout")).status_code == 204


# --- without it --------------------------------------------------------------------------------


async def test_without_its_options_there_is_no_such_way_in(start: Start, tmp_path: Path) -> None:
    plane = await start(tmp_path)
    stranger = await plane.client()
    for path in (LOGIN, "/auth/oidc/callback?code=x&state=y"):
        answer = await stranger.get(path)
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
        assert "OpenID Connect is not configured" in answer.json()["message"]
