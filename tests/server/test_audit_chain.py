"""The audit log cannot be changed unseen, and goes on when its beginning is pruned."""

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, update
from sqlmodel import col

from gpustack.schemas.audit import Action
from gpustack.schemas.events import ActorKind
from gpustack.server.db import audit_log, history, tables
from gpustack.server.db.acting import Actor, acting
from gpustack.server.db.audited import Entry
from tests.server.conftest import Plane, Start
from tests.support.audit import entries, verified

MODEL = {"name": "tiny", "source": "local_path", "local_path": "/m.gguf", "replicas": 0}


async def chain_of(plane: Plane, length: int = 6) -> None:
    admin = await plane.admin()
    for number in range(length):
        await admin.post("/v2/models", json=MODEL | {"name": f"m{number}"})
    found = await verified(plane)
    assert (found["problem"], found["entries"]) == (None, length)


async def write(plane: Plane, *statements: Any) -> None:
    """As somebody would who can reach the database."""
    async with plane.db.write() as session:
        for statement in statements:
            await session.exec(statement)


LOG = tables.AuditEntry
OTHER = {"id": 99, "user_id": None, "object_id": 77, "hash": "0" * 64, "previous": "0" * 64}


@pytest.mark.parametrize("row", [1, 3, 6])
async def test_no_column_of_any_row_can_be_changed_unseen(plane: Plane, row: int) -> None:
    await chain_of(plane)
    async with plane.db.read() as session:
        before = (await session.get_one(LOG, row)).model_dump()
    for name, value in before.items():
        other = value + timedelta(microseconds=1) if name == "at" else OTHER.get(name, f"{value}x")
        here = update(LOG).where(col(LOG.id) == row)
        await write(plane, here.values({name: other}))
        found = await verified(plane)
        assert found["problem"] is not None, name
        assert (found["problem"]["id"], found["entries"]) == (row, row - 1), name
        back = update(LOG).where(col(LOG.id) == (99 if name == "id" else row))
        await write(plane, back.values({name: value}))
        assert (await verified(plane))["problem"] is None


@pytest.mark.parametrize("row", [1, 3, 6])
async def test_no_row_can_be_removed_unseen(plane: Plane, row: int) -> None:
    await chain_of(plane)
    await write(plane, delete(LOG).where(col(LOG.id) == row))
    assert (await verified(plane))["problem"] == {"id": row, "why": "it is missing"}


async def test_two_rows_cannot_be_swapped_unseen(plane: Plane) -> None:
    await chain_of(plane)
    swap = [update(LOG).where(col(LOG.id) == old).values(id=new)
            for old, new in ((3, 90), (4, 3), (90, 4))]  # fmt: skip
    await write(plane, *swap)
    assert (await verified(plane))["problem"]["id"] == 3


async def test_no_row_can_be_added_unseen(plane: Plane) -> None:
    await chain_of(plane)
    async with plane.db.write() as session:
        last = await session.get_one(LOG, 6)
        forged = LOG(**last.model_dump() | {"id": 7, "previous": last.hash})
        forged.hash = audit_log.hash_of(forged)
        session.add(forged)
    assert (await verified(plane))["problem"]["id"] == 7


async def test_a_row_that_is_written_anew_with_its_hash_is_seen_at_the_next(plane: Plane) -> None:
    await chain_of(plane)
    async with plane.db.write() as session:
        row = await session.get_one(LOG, 3)
        row.username = "somebody else"
        row.hash = audit_log.hash_of(row)
    why = "it does not follow the one before it"
    assert (await verified(plane))["problem"] == {"id": 4, "why": why}


@pytest.mark.parametrize("column", ["pruned_id", "pruned_hash", "last_id", "last_hash", None])
async def test_the_ends_of_the_chain_cannot_be_moved_unseen(
    plane: Plane, column: str | None
) -> None:
    await chain_of(plane)
    chain = tables.AuditChain
    other = 2 if str(column).endswith("_id") else "0" * 64
    await write(plane, update(chain).values({column: other}) if column else delete(chain))
    assert (await verified(plane))["problem"] is not None


async def test_a_pruned_log_still_fits_and_goes_on(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    await chain_of(plane)
    monkeypatch.setattr(history, "KEPT_AUDIT_ENTRIES", 4)
    await history.prune(plane.db)
    found = await verified(plane)
    assert (found["problem"], found["first_id"], found["last_id"]) == (None, 3, 6)
    await (await plane.admin()).delete("/v2/models/1")
    monkeypatch.setattr(history, "AUDIT_KEPT_FOR", timedelta(0))
    await history.prune(plane.db)
    assert await entries(plane) == []
    assert await verified(plane) == {
        "entries": 0, "first_id": None, "last_id": None, "hash": "", "problem": None
    }  # fmt: skip
    await (await plane.admin()).delete("/v2/models/2")
    (after,) = await entries(plane)
    assert after["id"] == 8
    assert (await verified(plane))["problem"] is None
    await write(plane, update(LOG).values(peer="x"))
    assert (await verified(plane))["problem"]["id"] == 8


async def test_what_was_tampered_with_is_not_pruned_away(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    await chain_of(plane)
    await write(plane, update(LOG).where(col(LOG.id) == 3).values(username="somebody else"))
    monkeypatch.setattr(history, "AUDIT_KEPT_FOR", timedelta(0))
    await history.prune(plane.db)
    assert [one["id"] for one in await entries(plane)] == [3, 4, 5, 6]
    assert (await verified(plane))["problem"]["id"] == 3


async def test_several_servers_make_one_chain(start: Start, tmp_path: Path) -> None:
    planes = [await start(tmp_path), await start(tmp_path)]

    async def deploy(number: int, plane: Plane) -> None:
        admin = await plane.admin()
        for turn in range(10):
            name = f"m-{number}-{turn}"
            assert (await admin.post("/v2/models", json=MODEL | {"name": name})).is_success

    async def refuse(plane: Plane) -> None:  # takes no revision, and so no lock of its own
        with acting(Actor(ActorKind.USER)):
            for _ in range(10):
                async with plane.db.write() as session:
                    audit_log.add(session, Entry(Action.REFUSED, "routes", None, "PUT /"))

    async with asyncio.TaskGroup() as group:
        for number, plane in enumerate(planes):
            group.create_task(deploy(number, plane))
            group.create_task(refuse(plane))
    found = await verified(planes[0])
    assert (found["problem"], found["entries"]) == (None, 40)
