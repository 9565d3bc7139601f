"""Logging in, staying in and getting out, as a browser sees it; and what browsers are told."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlmodel import select

from gpustack.schemas import wire
from gpustack.server.auth.sessions import SESSION_LIFE
from gpustack.server.auth.throttle import PAIR_FREE, Throttle
from gpustack.server.db.tables import Credential, User
from gpustack.server.db.users import set_password
from tests.server.conftest import PASSWORD, Plane, Start

FORM = {"username": "admin", "password": PASSWORD}
WRONG = FORM | {"password": "wrong"}
HOME, ELSEWHERE = {wire.PEER_HEADER: "198.51.100.7"}, {wire.PEER_HEADER: "203.0.113.5"}


@pytest.fixture
def clock(plane: Plane) -> list[float]:
    """The throttle's time, which only the test moves."""
    now = [1000.0]
    plane.app.state.throttle = Throttle(lambda: now[0])
    return now


async def login(browser: httpx.AsyncClient, form: dict[str, str], **headers: str) -> httpx.Response:
    return await browser.post("/auth/login", data=form, headers=headers)


def told(answer: httpx.Response) -> tuple[int, dict[str, Any]]:
    return answer.status_code, answer.json()


# --- which ways there are --------------------------------------------------------------------


async def test_the_login_page_learns_which_ways_in_there_are(start: Start, tmp_path: Path) -> None:
    plane = await start(tmp_path)
    stranger = await plane.client()
    ways = {"is_local": True, "is_oidc": False, "is_saml": False}
    answer = await stranger.get("/auth/config")
    assert told(answer) == (200, ways | {"first_time_setup": False})
    async with plane.db.write() as session:
        (await session.get_one(User, 1)).require_password_change = True
    assert (await stranger.get("/auth/config")).json() == ways | {"first_time_setup": True}
    assert (await (await plane.admin()).put("/v2/users/1/password")).status_code == 200
    again = await stranger.get("/auth/config")  # that one must be changed too, but is not the first
    assert again.json() == ways | {"first_time_setup": False}


async def test_a_user_name_is_what_is_typed(plane: Plane) -> None:
    """Databases may compare without spaces at the end; the throttle counts what is typed."""
    browser = await plane.through_gateway()
    for name in ("admin ", " admin", "Admin"):
        assert (await login(browser, FORM | {"username": name})).status_code == 401
    assert (await login(browser, FORM)).status_code == 204


async def test_a_reset_stands_against_a_change_that_was_under_way(plane: Plane) -> None:
    browser = await plane.through_gateway()
    assert (await login(browser, FORM)).status_code == 204
    body = {"current_password": PASSWORD, "new_password": "Better-than-2"}
    async with asyncio.TaskGroup() as group:
        async with plane.db.write() as session:
            change = group.create_task(browser.post("/auth/update-password", json=body))
            await asyncio.sleep(1)  # it has compared, and waits for this
            user = await session.get_one(User, 1)
            await set_password(session, user, "another hash", must_change=True)
    assert change.result().status_code == 401
    async with plane.db.read() as session:
        assert (await session.get_one(User, 1)).password_hash == "another hash"


# --- trying passwords ------------------------------------------------------------------------


async def test_too_many_failures_say_when_to_try_again_and_are_over_then(
    plane: Plane, clock: list[float]
) -> None:
    browser = await plane.through_gateway()
    for _ in range(PAIR_FREE):
        assert (await login(browser, WRONG, **HOME)).status_code == 401
    refused = await login(browser, FORM, **HOME)
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["message"] == "too many failed attempts: try again in 1 s"
    clock[0] += 1
    assert (await login(browser, FORM, **HOME)).status_code == 204


async def test_an_attack_from_elsewhere_does_not_keep_the_owner_out(
    plane: Plane, clock: list[float]
) -> None:
    browser = await plane.through_gateway()
    assert (await login(browser, FORM, **HOME)).status_code == 204
    for n in range(40):
        await login(browser, WRONG, **{wire.PEER_HEADER: f"203.0.113.{n}"})
    assert (await login(browser, FORM, **ELSEWHERE)).status_code == 429
    assert (await login(browser, FORM, **HOME)).status_code == 204


async def test_an_account_that_does_not_exist_is_answered_like_one_that_does(
    plane: Plane, clock: list[float]
) -> None:
    browser = await plane.through_gateway()
    answers, took = [], []
    await login(browser, WRONG | {"username": "first"}, **HOME)  # makes what is compared with
    for name in ("admin", "nobody"):
        began = time.process_time()
        one = [await login(browser, WRONG | {"username": name}, **ELSEWHERE) for _ in range(7)]
        took.append(time.process_time() - began)
        answers.append([told(answer) for answer in one])
    assert answers[0] == answers[1]
    assert [status for status, _ in answers[0]] == [401] * PAIR_FREE + [429] * 2
    assert 0.5 < took[0] / took[1] < 2


async def test_a_wrong_login_says_what_to_do(plane: Plane) -> None:
    answer = await login(await plane.through_gateway(), WRONG)
    assert "ask an administrator" in answer.json()["message"]
    assert "gpustack reset-admin-password" in answer.json()["message"]
    assert answer.headers["www-authenticate"] == "Bearer"


async def test_the_address_is_the_one_that_a_gateway_says(plane: Plane, clock: list[float]) -> None:
    """Else whoever sends another address with each request would never have to wait."""
    stranger = await plane.client()
    for n in range(PAIR_FREE + 1):
        forged = {wire.PEER_HEADER: f"203.0.113.{n}", "X-Forwarded-For": f"203.0.113.{n}"}
        answer = await login(stranger, WRONG, **forged, **{wire.GATEWAY_HEADER: "made up"})
    assert answer.status_code == 429


async def test_a_wrong_current_password_counts_too(plane: Plane, clock: list[float]) -> None:
    browser = await plane.through_gateway(**HOME)
    assert (await login(browser, FORM)).status_code == 204
    change = {"current_password": "wrong", "new_password": "Better-than-2"}
    for _ in range(PAIR_FREE):
        assert (await browser.post("/auth/update-password", json=change)).status_code == 401
    right = change | {"current_password": PASSWORD}
    refused = await browser.post("/auth/update-password", json=right)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert (await login(browser, FORM)).status_code == 429
    clock[0] += 1
    assert (await browser.post("/auth/update-password", json=right)).status_code == 204


# --- sessions --------------------------------------------------------------------------------


async def test_the_cookie_is_out_of_reach_and_of_two_hours(plane: Plane) -> None:
    browser = await plane.through_gateway()
    _, *said = (await login(browser, FORM)).headers["set-cookie"].split("; ")
    assert {*said} == {"HttpOnly", "Max-Age=7200", "Path=/", "SameSite=lax"}
    cookie = (await login(browser, FORM, **{wire.SCHEME_HEADER: "https"})).headers["set-cookie"]
    assert cookie.endswith("; Secure")
    stranger = await plane.client()  # whose word of the scheme counts for nothing
    cookie = (await login(stranger, FORM, **{wire.SCHEME_HEADER: "https"})).headers["set-cookie"]
    assert "Secure" not in cookie


async def _ends_in(plane: Plane, left: timedelta) -> None:
    async with plane.db.write() as session:
        for row in await session.exec(select(Credential).where(Credential.kind == "session")):
            row.expires_at = datetime.now(UTC) + left


async def test_a_session_that_is_used_goes_on_in_the_browser_too(plane: Plane) -> None:
    browser = await plane.through_gateway(**{wire.SCHEME_HEADER: "https"})
    browser.base_url = httpx.URL("https://test")
    first = (await login(browser, FORM)).headers["set-cookie"]
    assert "set-cookie" not in (await browser.get("/v2/users/me")).headers  # just begun
    await _ends_in(plane, timedelta(minutes=1))
    answer = await browser.post("/v2/api-keys", json={"name": "k"})
    assert (answer.status_code, answer.headers["set-cookie"]) == (201, first)
    async with plane.db.read() as session:
        rows = await session.exec(select(Credential).where(Credential.kind == "session"))
        end = rows.one().expires_at
    assert end is not None
    assert end - datetime.now(UTC) > SESSION_LIFE - timedelta(minutes=1)
    await _ends_in(plane, timedelta(seconds=-1))
    assert (await browser.get("/v2/users/me")).status_code == 401


async def test_a_logout_at_the_end_of_a_session_leaves_no_cookie(plane: Plane) -> None:
    browser = await plane.through_gateway()
    await login(browser, FORM)
    await _ends_in(plane, timedelta(minutes=1))
    cookies = (await browser.post("/auth/logout")).headers.get_list("set-cookie")
    assert len(cookies) == 1
    assert "Max-Age=0" in cookies[0]
    assert not browser.cookies


async def test_no_page_of_another_site_logs_its_visitors_in(plane: Plane) -> None:
    browser = await plane.through_gateway()
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        answer = await login(browser, FORM, **headers)
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
        assert "Host" in answer.json()["message"]  # what whoever runs a proxy can do
        assert (await login(browser, FORM, **headers, **{wire.VOUCHED_HEADER: "1"})).is_success
    assert (await login(browser, FORM, Origin="http://test")).is_success


# --- what browsers are told ------------------------------------------------------------------


async def test_every_answer_tells_browsers_what_it_is(plane: Plane) -> None:
    admin, stranger = await plane.admin(), await plane.client()
    answers = {
        200: await admin.get("/v2/models"),
        401: await stranger.get("/v2/models"),
        404: await admin.get("/made-up"),
        405: await admin.delete("/version"),
        204: await login(stranger, FORM),
    }
    for status, answer in answers.items():
        assert answer.status_code == status
        policy = "default-src 'none'; frame-ancestors 'none'"
        assert answer.headers.get_list("content-security-policy") == [policy]
    for page in ("/docs", "/redoc"):
        answers[len(answers)] = answer = await admin.get(page)
        (policy,) = answer.headers.get_list("content-security-policy")
        assert policy.startswith("default-src 'self'; ")
        assert policy.endswith("frame-ancestors 'none'")
        assert not {"*", "http:", "https:", "'unsafe-eval'"} & {*policy.split()}
    for answer in answers.values():
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert not [name for name in answer.headers if name.startswith("access-control-")]


async def test_an_answer_to_our_own_mistake_tells_it_too(plane: Plane) -> None:
    async def fail() -> None:
        raise RuntimeError

    plane.app.add_api_route("/fails", fail)
    transport = httpx.ASGITransport(plane.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        answer = await http.get("/fails")
    assert answer.status_code == 500
    assert answer.headers["x-content-type-options"] == "nosniff"
