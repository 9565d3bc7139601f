"""Users from elsewhere: known by issuer and subject, never by a name."""

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import select

from gpustack.config.load import load
from gpustack.errors import Forbidden
from gpustack.schemas import wire
from gpustack.schemas.users import Source
from gpustack.server.auth.external import Profile, log_in, profile
from gpustack.server.db.tables import Credential, Identity, User
from tests.server.conftest import PASSWORD, Plane, Start
from tests.server.test_leases import on_shared

ISSUER = "https://id.example"
USERS = "/v2/users"


def said(claims: dict[str, Any], prefix: str = "", subject: str = "s1", **options: str) -> Profile:
    settings = dataclasses.replace(load({}, {}).settings, **options)  # type: ignore[arg-type]
    return profile(
        claims, settings, issuer=ISSUER, subject=subject, source=Source.OIDC, prefix=prefix
    )


def who(username: str = "alice", subject: str = "s1", **more: Any) -> Profile:
    nothing = {"full_name": None, "avatar_url": None, "source": Source.OIDC}
    return Profile(**{"issuer": ISSUER, "subject": subject, "username": username} | nothing | more)


async def users(plane: Plane) -> list[dict[str, Any]]:
    """All but the first administrator."""
    found: list[dict[str, Any]] = (await (await plane.admin()).get(USERS)).json()["items"]
    return [one for one in found if one["id"] != 1]


# --- what a provider says ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claims", "options", "username", "full_name", "avatar_url"),
    [
        ({}, {}, "s1", None, None),
        ({"email": "a@b.c"}, {}, "a@b.c", None, None),
        (
            {"preferred_username": "al", "email": "a@b.c", "name": "Al B", "picture": "https://p"},
            {}, "al", "Al B", "https://p",
        ),
        (
            {"upn": ["al", "ice"], "given": "Al", "family": "Bo", "photo": "http://p/1"},
            {"external_auth_name": "upn", "external_auth_full_name": "given+family",
             "external_auth_avatar_url": "photo"},
            "al", "Al Bo", "http://p/1",
        ),
        ({"given": "Al"}, {"external_auth_full_name": "given + family"}, "s1", "Al", None),
        ({"email": "a", "preferred_username": 7}, {}, "7", None, None),
        ({"email": "a", "preferred_username": {"x": 1}}, {}, "a", None, None),
        ({"preferred_username": " a b:c/d\u202ee\n"}, {}, "a-b-c-d-e", None, None),
        ({"preferred_username": "x" * 200, "name": "y" * 200}, {}, "x" * 128, "y" * 128, None),
        ({"picture": "javascript:alert(1)"}, {}, "s1", None, None),
        ({"picture": "https://p/" + "x" * 2048}, {}, "s1", None, None),
        ({"picture": "https://[p"}, {}, "s1", None, None),
    ],
)  # fmt: skip
def test_claims_become_a_profile(
    claims: dict[str, Any],
    options: dict[str, str],
    username: str,
    full_name: str | None,
    avatar_url: str | None,
) -> None:
    made = said(claims, **options)
    assert made == who(username, full_name=full_name, avatar_url=avatar_url)


def test_attributes_may_have_a_prefix() -> None:
    attributes = {"urn:name": ["al"], "urn:mail": ["a@b"], "mail": ["no"]}
    made = said(attributes, "urn:", external_auth_name="mail", external_auth_full_name="name")
    assert (made.username, made.full_name) == ("a@b", "al")


def test_a_claim_that_an_option_names_must_be_there() -> None:
    with pytest.raises(Forbidden, match=r"no upn, which --external-auth-name .* email, sub"):
        said({"sub": "s1", "email": "secret@mail"}, external_auth_name="upn")


@pytest.mark.parametrize("subject", ["", " s1", "s1 ", "s\x001", "s" * 321])
def test_a_subject_that_databases_might_take_for_another_is_refused(subject: str) -> None:
    with pytest.raises(Forbidden, match="subject cannot be kept"):
        said({}, subject=subject)


# --- who it is here ----------------------------------------------------------------------------


async def test_the_first_login_makes_a_user_and_the_next_ones_find_it(plane: Plane) -> None:
    first = await log_in(plane.db, who(full_name="Al", avatar_url="https://p"), peer="10.0.0.1")
    me = (await (await plane.client(first)).get(f"{USERS}/me")).json()
    expected: dict[str, Any] = {"username": "alice", "full_name": "Al", "avatar_url": "https://p"}
    expected |= {"source": "oidc", "is_admin": False, "require_password_change": False}
    assert {name: me[name] for name in expected} == expected
    second = await log_in(plane.db, who("another", full_name="Al Bo"), peer="10.0.0.1")
    assert second != first
    now = (await (await plane.client(second)).get(f"{USERS}/me")).json()
    assert now == me | {"full_name": "Al Bo", "avatar_url": None, "generation": 2}
    assert (await (await plane.client(first)).get(f"{USERS}/me")).json() == now
    await log_in(plane.db, who(), peer="10.0.0.1")  # whose name is not known there any more
    assert await users(plane) == [now]


async def test_a_name_that_somebody_has_is_never_taken_over(plane: Plane) -> None:
    await log_in(plane.db, who("admin"), peer="")
    await log_in(plane.db, who("admin", "s2"), peer="")
    await log_in(plane.db, who("admin", "S2"), peer="")
    await log_in(plane.db, who("admin", issuer="https://other.example"), peer="")
    await log_in(plane.db, who("admin", source=Source.SAML), peer="")  # the same issuer's s1
    names = ["admin-2", "admin-3", "admin-4", "admin-5", "admin-6"]
    assert [one["username"] for one in await users(plane)] == names
    assert not any(one["is_admin"] for one in await users(plane))
    long = "x" * 128
    for subject in ("s3", "s4"):
        await log_in(plane.db, who(long, subject), peer="")
    assert [one["username"] for one in await users(plane)][5:] == [long, "x" * 126 + "-2"]


async def test_a_disabled_user_gets_no_session(plane: Plane) -> None:
    await log_in(plane.db, who(), peer="")
    admin = await plane.admin()
    body = {"username": "alice", "is_admin": False, "is_active": False}
    assert (await admin.put(f"{USERS}/2", json=body)).status_code == 200
    with pytest.raises(Forbidden, match="this user is disabled: ask an administrator"):
        await log_in(plane.db, who(full_name="new"), peer="")
    async with plane.db.read() as session:
        rows = await session.exec(select(Credential).where(Credential.user_id == 2))
        assert not rows.all()
        assert (await session.get_one(User, 2)).full_name is None


async def test_who_was_deleted_begins_anew(plane: Plane) -> None:
    await log_in(plane.db, who(), peer="")
    assert (await (await plane.admin()).delete(f"{USERS}/2")).status_code == 204
    async with plane.db.read() as session:
        assert not (await session.exec(select(Identity))).all()
    await log_in(plane.db, who(), peer="")
    assert [one["id"] for one in await users(plane)] == [3]


async def test_a_user_from_elsewhere_has_no_password_here(plane: Plane) -> None:
    session = await plane.client(await log_in(plane.db, who(), peer=""))
    admin, stranger = await plane.admin(), await plane.client()
    for password in ("", PASSWORD):
        form = {"username": "alice", "password": password}
        refused = await stranger.post("/auth/login", json=form)
        assert refused.status_code == 401
        assert "users of an identity provider have no password here" in refused.json()["message"]
    change = {"current_password": PASSWORD, "new_password": "Better-than-2"}
    rights = {"username": "alice", "is_admin": False}
    for answer in (
        await session.post("/auth/update-password", json=change),
        await admin.put(f"{USERS}/2/password"),
        await admin.put(f"{USERS}/2", json=rights | {"password": PASSWORD}),
        await admin.put(f"{USERS}/2", json=rights | {"require_password_change": True}),
    ):
        assert answer.status_code == 409, answer.text
        assert "alice logs in with an identity provider" in answer.json()["message"]
    assert (await admin.put(f"{USERS}/2", json=rights | {"username": "al"})).status_code == 200
    assert (await session.get(f"{USERS}/me")).json()["username"] == "al"


async def test_nobody_says_where_a_user_comes_from(plane: Plane) -> None:
    admin = await plane.admin()
    for name, value in (("source", "oidc"), ("avatar_url", "https://p")):
        body = {"username": "eve", "password": PASSWORD, "is_admin": False, name: value}
        assert (await admin.post(USERS, json=body)).status_code == 422
        assert (await admin.put(f"{USERS}/1", json=body)).status_code == 422
        assert (await admin.put(f"{USERS}/me", json={name: value})).status_code == 422


async def test_the_audit_log_says_who_came_and_from_where(plane: Plane) -> None:
    await log_in(plane.db, who(), peer="10.0.0.1", provider_session={"id_token": "hidden-token"})
    answer = await (await plane.admin()).get("/v2/audit")
    (entry,) = answer.json()["items"]
    told = ("create", "users", "alice", 2, "alice", "oidc", ISSUER, "10.0.0.1")
    names = ("action", "kind", "name", "user_id", "username", "credential_kind")
    assert tuple(entry[name] for name in (*names, "credential_name", "peer")) == told
    assert entry["changed"]["source"] == {"before": None, "after": "oidc"}
    assert "hidden-token" not in answer.text


async def test_the_first_administrator_is_one_with_a_password(plane: Plane) -> None:
    """Whom `gpustack reset-admin-password` helps."""
    await log_in(plane.db, who(), peer="")
    admin = await plane.admin()
    await admin.post(USERS, json={"username": "bob", "password": PASSWORD, "is_admin": True})
    await admin.put(f"{USERS}/2", json={"username": "alice", "is_admin": True})
    assert (await admin.delete(f"{USERS}/1")).status_code == 204
    for client in (admin, await plane.through_gateway(**{wire.LOCAL_HEADER: "1"})):
        assert (await client.get(f"{USERS}/me")).json()["username"] == "bob"


# --- at once -----------------------------------------------------------------------------------


@on_shared
async def test_of_first_logins_at_two_servers_at_once_comes_one_user(
    start: Start, tmp_path: Path
) -> None:
    planes = [await start(tmp_path / "a"), await start(tmp_path / "b")]
    for turn in range(5):
        same = who("same", f"same{turn}")
        logins = [log_in(plane.db, same, peer="") for plane in planes for _ in range(2)]
        assert len(set(await asyncio.gather(*logins))) == 4
    made = [one["username"] for one in await users(planes[0])]
    assert sorted(made) == ["same", "same-2", "same-3", "same-4", "same-5"]
    logins = [
        log_in(plane.db, who("rival", f"{name}{turn}"), peer="")
        for turn in range(3)
        for name, plane in zip("ab", planes, strict=True)
    ]
    await asyncio.gather(*logins)
    made = [one["username"] for one in await users(planes[0])][5:]
    assert sorted(made) == ["rival", *(f"rival-{n}" for n in range(2, 7))]
