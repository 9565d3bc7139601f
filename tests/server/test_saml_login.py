"""Logging in through a SAML identity provider, as its browser and several servers see it."""

import asyncio
import base64
import zlib
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from lxml import etree
from sqlmodel import select

from gpustack.schemas import wire
from gpustack.schemas.users import Source
from gpustack.server.auth.saml import ServiceProvider
from gpustack.server.db import history
from gpustack.server.db.tables import Identity, SamlMessage, now
from tests.server.conftest import Plane, Start
from tests.support.saml_messages import (
    CALLBACK,
    IDP,
    PERSISTENT,
    SP,
    Answer,
    at,
    form,
    logout_request,
    pair,
    response,
    signed,
)  # fmt: skip

SP_PAIR, IDP_PAIR, OTHER = pair("sp"), pair("idp"), pair("other")
LOGOUT = "https://gpu.example/auth/saml/logout/callback"
SLO = "https://idp.example/slo"
OPTIONS = {
    "saml_idp_server_url": "https://idp.example/sso",
    "saml_idp_entity_id": IDP,
    "saml_idp_x509_cert": IDP_PAIR.certificate,
    "saml_idp_logout_url": SLO,
    "saml_sp_entity_id": SP,
    "saml_sp_acs_url": CALLBACK,
    "saml_sp_x509_cert": SP_PAIR.certificate,
    "saml_sp_private_key": SP_PAIR.key,
    "external_auth_name": "email",
}
OVER = "begin again at https://gpu.example/auth/saml/login"


@pytest.fixture
async def plane(start: Start, tmp_path: Path) -> Plane:
    return await start(tmp_path, **OPTIONS)


async def asked(browser: httpx.AsyncClient) -> str:
    """Begin a login; answers the id of its request."""
    sent = await browser.get("/auth/saml/login")
    assert sent.status_code == 303, sent.text
    query = parse_qs(urlsplit(sent.headers["location"]).query)
    request = zlib.decompress(base64.b64decode(query["SAMLRequest"][0]), -15)
    return str(etree.fromstring(request).get("ID"))


async def post(plane: Plane, answer: str) -> httpx.Response:
    """As the identity provider's page has the browser post it: without a cookie."""
    there = await plane.through_gateway(origin="https://idp.example")
    return await there.post("/auth/saml/callback", data={"SAMLResponse": answer})


def answer_to(request: str, **changes: Any) -> str:
    return form(signed(Answer(request, request).but(**changes), IDP_PAIR))


async def login(plane: Plane, browser: httpx.AsyncClient, **changes: Any) -> httpx.Response:
    posted = await post(plane, answer_to(await asked(browser), **changes))
    assert posted.status_code == 303, posted.text
    return await browser.get(posted.headers["location"])


async def username(browser: httpx.AsyncClient) -> str | None:
    answer = await browser.get("/v2/users/me")
    return answer.json()["username"] if answer.is_success else None


async def test_a_login_opens_a_session_of_a_user_who_is_made_at_the_first(plane: Plane) -> None:
    assert (await (await plane.client()).get("/auth/config")).json()["is_saml"]
    browser = await plane.through_gateway(**{wire.SCHEME_HEADER: "https"})
    begun = await browser.get("/auth/saml/login")
    cookie = begun.headers["set-cookie"]
    assert "; HttpOnly; " in cookie
    assert cookie.endswith("; SameSite=lax; Secure")
    browser = await plane.through_gateway()
    done = await login(plane, browser)
    assert (done.status_code, done.headers["location"]) == (303, "/")
    assert await username(browser) == "alice@example.org"
    mine = (await browser.get("/v2/users/me")).json()
    assert (mine["full_name"], mine["source"], mine["is_admin"]) == ("Alice", "saml", False)
    another = await plane.through_gateway()
    await login(plane, another, attributes=(("email", "alicia@example.org"),))
    assert await username(another) == "alice@example.org"  # known by the NameID
    async with plane.db.read() as session:
        (known,) = (await session.exec(select(Identity))).all()
    assert (known.source, known.issuer) == (Source.SAML, IDP)
    assert known.subject == f"{PERSISTENT}!!!alice"


async def test_nobody_else_finishes_a_login(plane: Plane) -> None:
    """Else an attacker could have a victim act in the attacker's account."""
    attacker, victim = await plane.through_gateway(), await plane.through_gateway()
    posted = await post(plane, answer_to(await asked(attacker)))
    await asked(victim)
    for browser in (victim, await plane.through_gateway()):
        refused = await browser.get(posted.headers["location"])
        assert refused.status_code == 403
        assert refused.json()["message"].endswith(OVER)
        assert await username(browser) is None
    assert (await attacker.get(posted.headers["location"])).status_code == 303
    again = await attacker.get(posted.headers["location"])
    assert (again.status_code, again.json()["message"]) == (403, f"this login is over: {OVER}")


async def test_what_nobody_asked_for_opens_nothing(plane: Plane) -> None:
    browser = await plane.through_gateway()
    await asked(browser)
    posted = await post(plane, answer_to("_made-up"))
    assert (await browser.get(posted.headers["location"])).status_code == 403
    unasked = form(signed(Answer(None, None), IDP_PAIR))
    refused = await post(plane, unasked)
    assert refused.status_code == 403
    assert "nobody asked" in refused.json()["message"]


async def test_an_answer_is_taken_once_whichever_server_it_comes_to(
    plane: Plane, start: Start, tmp_path: Path
) -> None:
    other = await start(tmp_path / "other", **OPTIONS)
    browser = await plane.through_gateway()
    answer = answer_to(await asked(browser))
    posted = await post(plane, answer)
    for server in (plane, other):
        again = await post(server, answer)
        assert (again.status_code, again.json()["code"]) == (403, "forbidden")
        assert "was used before" in again.json()["message"]
    # A login may go on at another server than it came to.
    there = await other.through_gateway()
    there.cookies = browser.cookies
    assert (await there.get(posted.headers["location"])).status_code == 303
    assert await username(there) == "alice@example.org"


async def test_what_was_taken_is_kept_for_as_long_as_it_could_be_used(plane: Plane) -> None:
    browser = await plane.through_gateway()
    await login(plane, browser)
    async with plane.db.read() as session:
        (row,) = (await session.exec(select(SamlMessage))).all()
    assert (row.content, row.ticket) == ({}, None)
    await history.prune(plane.db)
    async with plane.db.write() as session:
        row = await session.get_one(SamlMessage, row.digest)
        row.ends_at = now() - history.SAML_MESSAGES_KEPT_FOR - timedelta(seconds=2)
    await history.prune(plane.db)
    async with plane.db.read() as session:
        assert (await session.exec(select(SamlMessage))).all() == []


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True, scope="session")
async def test_refusals_say_what_to_do_and_the_log_why(
    plane: Plane, caplog: pytest.LogCaptureFixture
) -> None:
    forged = form(response(Answer(audience="https://x.example/\n2026 ERROR all is lost")))
    refused = await post(plane, forged)
    assert refused.status_code == 403
    assert "administrator" in refused.json()["message"]
    assert "all is lost" not in refused.text
    (line,) = [one.getMessage() for one in caplog.records if "SAML answer" in one.getMessage()]
    assert "\n" not in line
    for body, status in ((b"", 400), (b"SAMLResponse=a&SAMLResponse=b", 400), (b"\xff" * 9, 400),
                         (b"SAMLResponse=a" + b"&x" * 16, 400),
                         (b"SAMLResponse=" + b"a" * 2**20, 413)):  # fmt: skip
        said = await (await plane.client()).post("/auth/saml/callback", content=body)
        assert said.status_code == status
    many = await (await plane.client()).get("/auth/saml/logout/callback?" + "x=&" * 16)
    assert (many.status_code, "at most 16 fields" in many.text) == (400, True)
    by_redirect = await (await plane.client()).get("/auth/saml/callback?SAMLResponse=a")
    assert by_redirect.status_code == 400
    assert "HTTP-POST" in by_redirect.json()["message"]
    other = "urn:oasis:names:tc:SAML:1.1:nameid-format:emailAddress"
    long = await post(plane, answer_to("_r", name_id="a" * 300, format=other))
    assert "subject cannot be kept" in long.json()["message"]
    nameless = await post(plane, answer_to("_r", attributes=(("mail", "a@b"),)))
    assert "sent no email" in nameless.json()["message"]


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True, scope="session")
async def test_attributes_are_named_with_their_prefix(start: Start, tmp_path: Path) -> None:
    prefix = "http://schemas.example/claims/"
    plane = await start(tmp_path, **OPTIONS, saml_sp_attribute_prefix=prefix)
    browser = await plane.through_gateway()
    await login(plane, browser, attributes=((f"{prefix}email", "bob@example.org"),))
    assert await username(browser) == "bob@example.org"


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True, scope="session")
async def test_without_saml_its_routes_say_so(start: Start, tmp_path: Path) -> None:
    plain = await (await start(tmp_path)).client()
    for method, path in (("GET", "metadata"), ("GET", "login"), ("GET", "callback"),
                         ("POST", "callback"), ("GET", "logout/callback")):  # fmt: skip
        said = await plain.request(method, f"/auth/saml/{path}")
        assert said.status_code == 404
        assert "--saml-idp-server-url" in said.json()["message"]
    without = {key: value for key, value in OPTIONS.items() if key != "saml_idp_logout_url"}
    plane = await start(tmp_path / "other", **without)
    said = await (await plane.client()).get("/auth/saml/logout/callback")
    assert (said.status_code, "--saml-idp-logout-url" in said.text) == (404, True)


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True, scope="session")
async def test_a_person_reads_a_page(plane: Plane) -> None:
    browser = await plane.through_gateway(accept="text/html")
    refused = await browser.get("/auth/saml/callback?ticket=<x>")
    assert (refused.status_code, refused.headers["content-type"][:9]) == (403, "text/html")
    assert OVER in refused.text


async def test_of_servers_that_get_an_answer_at_once_one_takes_it(
    plane: Plane, start: Start, tmp_path: Path
) -> None:
    other = await start(tmp_path / "other", **OPTIONS)
    answer = answer_to(await asked(await plane.through_gateway()))
    async with asyncio.TaskGroup() as group:
        posted = [group.create_task(post(one, answer)) for one in (plane, other) * 3]
    assert sorted(one.result().status_code for one in posted) == [303] + [403] * 5


# --- single logout ---------------------------------------------------------------------------


async def test_sessions_end_when_the_identity_provider_says_so(plane: Plane) -> None:
    browser, elsewhere = await plane.through_gateway(), await plane.through_gateway()
    await login(plane, browser)
    await login(plane, elsewhere)
    query = logout_request(IDP_PAIR, session_index="_session", relay_state="a&b")
    out = await (await plane.client()).get(f"/auth/saml/logout/callback?{query}")
    assert out.status_code == 303, out.text
    assert await username(browser) is None
    assert await username(elsewhere) is None
    place, _, answer = out.headers["location"].partition("?")
    said = parse_qs(answer)
    assert (place, said["RelayState"]) == (SLO, ["a&b"])
    told = etree.fromstring(zlib.decompress(base64.b64decode(said["SAMLResponse"][0]), -15))
    assert told.get("InResponseTo") == "_logout"
    assert "Signature" in said
    again = await (await plane.client()).get(f"/auth/saml/logout/callback?{query}")
    assert "was used before" in again.json()["message"]


async def test_a_logout_here_is_one_at_the_identity_provider(plane: Plane) -> None:
    browser = await plane.through_gateway()
    await login(plane, browser)
    out = await browser.post("/auth/logout")
    place, _, query = out.json()["logout_url"].partition("?")
    said = parse_qs(query)
    request = etree.fromstring(zlib.decompress(base64.b64decode(said["SAMLRequest"][0]), -15))
    texts = [one.text for one in request.iter() if one.text and one.text.strip()]
    assert (place, request.get("Destination")) == (SLO, SLO)
    assert texts == [SP, "alice", "_session"]
    assert "Signature" in said
    assert await username(browser) is None
    back = await browser.get("/auth/saml/logout/callback?SAMLResponse=x")
    assert (back.status_code, back.headers["location"]) == (303, "/")


async def test_other_sessions_of_a_login_elsewhere_go_on(plane: Plane) -> None:
    browser = await plane.through_gateway()
    await login(plane, browser)
    for more in ({"session_index": "_other"}, {"name_id": "bob"}, {"format": None}):
        query = logout_request(IDP_PAIR, id=f"_{next(iter(more))}", **more)
        out = await (await plane.client()).get(f"/auth/saml/logout/callback?{query}")
        assert out.status_code == 303, out.text
        assert await username(browser) == "alice@example.org"


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True, scope="session")
async def test_nobody_else_logs_a_user_out(plane: Plane) -> None:
    browser = await plane.through_gateway()
    await login(plane, browser)
    stranger = await plane.client()
    good = logout_request(IDP_PAIR)
    unsigned = good.partition("&SigAlg")[0]
    for query in (
        unsigned,
        good.replace("RelayState=x", "RelayState=y"),
        logout_request(OTHER),
        logout_request(IDP_PAIR, destination="https://other.example/auth/saml/logout/callback"),
        logout_request(IDP_PAIR, destination=LOGOUT + "/evil"),
        logout_request(IDP_PAIR, destination=None),
        logout_request(IDP_PAIR, issuer="https://other.example"),
        logout_request(IDP_PAIR, issuer=""),
        logout_request(IDP_PAIR, made_at=at(-900)),
        logout_request(IDP_PAIR, not_on_or_after=at(-5)),
        f"{good}&%53AMLRequest={logout_request(OTHER)[12:].partition('&')[0]}",
        "SAMLRequest=",
    ):
        said = await stranger.get(f"/auth/saml/logout/callback?{query}")
        assert said.status_code == 403, query
        assert await username(browser) == "alice@example.org"
    assert (await stranger.get(f"/auth/saml/logout/callback?{good}")).status_code == 303
    assert await username(browser) is None


# --- what is sent ----------------------------------------------------------------------------


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True, scope="session")
async def test_metadata_are_there_for_anybody(plane: Plane) -> None:
    said = await (await plane.client()).get("/auth/saml/metadata")
    assert said.headers["content-type"] == "application/samlmetadata+xml"
    provider: ServiceProvider = plane.app.state.providers[Source.SAML]
    assert said.content == provider.metadata
