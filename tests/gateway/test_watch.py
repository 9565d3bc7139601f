"""How a gateway's tables follow the server's."""

import asyncio
import json
import stat
from pathlib import Path

import msgspec
import pytest

from gpustack.gateway.tables import Tables
from gpustack.gateway.watch import Disk, reached
from gpustack.schemas import wire
from tests.support.data_plane import fill, gateway
from tests.support.openai_engine import running
from tests.support.raw_http import ask
from tests.support.wait import eventually
from tests.support.watch_server import credential, instance, model, watch_server


async def test_tables_are_replaced_only_when_the_list_is_complete(tmp_path: Path) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            old = gate.watch.tables
            server.synced.clear()
            server.epoch = "restored"  # what was heard says nothing of this history
            for wire_ in list(server.watches):
                wire_.die()

            async def away() -> bool:
                return not gate.watch.connected

            await eventually(away, "the watch is lost")
            await asyncio.sleep(0.3)  # connected again by now, and half of the list is there
            assert gate.watch.tables is old
            assert (await gate.chat()).status == 200
            server.synced.set()

            async def swapped() -> bool:
                return gate.watch.tables is not old and gate.watch.connected

            await eventually(swapped, "new tables")


async def test_what_went_away_while_the_watch_was_lost_is_gone_after_it(tmp_path: Path) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            server.announces = False
            server.delete("credentials", 1)
            for wire_ in list(server.watches):
                wire_.die()

            async def refused() -> bool:
                return (await gate.chat()).status == 401

            await eventually(refused, "the deleted key is refused")


async def test_a_watch_that_broke_goes_on_where_it_was(tmp_path: Path) -> None:
    async with watch_server() as server:
        fill(server)
        async with gateway(tmp_path, server.port) as gate:
            tables = gate.watch.tables
            assert tables is not None
            server.tell(server.line("heartbeat"))
            reached_there = f"{server.epoch}.{server.revision}"
            server.announces = False
            server.put("models", model(8, "meanwhile"))
            server.delete("models", 1)
            for wire_ in list(server.watches):
                wire_.die()

            async def resumed() -> bool:
                return set(tables.by_name) == {"meanwhile"}

            await eventually(resumed, "the changes of meanwhile")
            assert server.sinces == ["", reached_there]
            assert gate.watch.tables is tables


async def test_a_server_that_refuses_the_cursor_is_asked_for_everything(tmp_path: Path) -> None:
    async with watch_server() as server:
        fill(server)
        async with gateway(tmp_path, server.port) as gate:
            server.refuses_cursors = True
            server.announces = False
            server.delete("models", 1)
            for wire_ in list(server.watches):
                wire_.die()

            async def new() -> bool:
                return gate.watch.tables is not None and not gate.watch.tables.by_name

            await eventually(new, "the whole list")


async def test_a_resync_begins_a_new_list(tmp_path: Path) -> None:
    async with watch_server() as server:
        fill(server)
        async with gateway(tmp_path, server.port) as gate:
            assert gate.watch.tables is not None
            server.tell(server.line("resync"))
            one = model(9, "other")
            server.tell(server.line("put", kind="models", id=9, data=one))
            await asyncio.sleep(0.05)
            assert "m" in gate.watch.tables.by_name
            server.tell(server.line("synced"))

            async def new() -> bool:
                tables = gate.watch.tables
                return tables is not None and set(tables.by_name) == {"other"}

            await eventually(new, "the new list")


async def test_an_object_that_is_not_readable_does_not_stop_the_others(tmp_path: Path) -> None:
    async with watch_server() as server:
        fill(server)
        server.put("models", {"id": 7, "name": 5, "created_at": "never"})
        server.put("models", model(8, "after"))
        server.put("unknown-kind", {"id": 1})
        async with gateway(tmp_path, server.port) as gate:
            assert gate.watch.tables is not None
            assert set(gate.watch.tables.by_name) == {"m", "after"}


async def test_an_object_with_a_broken_letter_does_not_stop_the_others(tmp_path: Path) -> None:
    async with watch_server() as server, running() as engine:
        fill(server)
        async with gateway(tmp_path, server.port) as gate:
            connected = len(server.watches)
            head = b'{"type":"put","kind":"models","id":9,"cursor":"e.9","data":'
            server.tell(head + b'{"id":9,"name":"\xff","created_at":"2026-01-02T03:04:05Z"}}\n')
            server.put("model-instances", instance(1, 1, engine.port))

            async def served() -> bool:
                return (await gate.chat()).status == 200

            await eventually(served, "the instance after it")
            assert len(server.watches) == connected
            assert gate.watch.connected


async def test_a_refresh_asked_for_during_another_waits_for_the_next(tmp_path: Path) -> None:
    async with watch_server() as server:
        fill(server)
        async with gateway(tmp_path, server.port) as gate:
            first = asyncio.ensure_future(gate.watch.refresh())
            while server.flushes == 0:  # noqa: ASYNC110
                await asyncio.sleep(0)
            second = asyncio.ensure_future(gate.watch.refresh())
            assert await first
            assert await second
            assert server.flushes == 2


async def test_a_refresh_is_no_success_before_its_cursor_was_reached(tmp_path: Path) -> None:
    async with watch_server() as server:
        fill(server)
        async with gateway(tmp_path, server.port) as gate:
            server.epoch = "restored"  # what the watch says now is of another history
            server.watches.clear()
            async with asyncio.timeout(0.8):
                assert not await gate.watch.refresh()


@pytest.mark.parametrize(
    ("cursor", "wanted", "answer"),
    [
        ("e.5", "e.5", True),
        ("e.10", "e.9", True),
        ("e.4", "e.5", False),
        ("f.9", "e.5", False),
        (None, "e.5", False),
        ("e.x", "e.5", False),
        ("a.b.7", "a.b.7", True),
    ],
)
def test_cursors_compare_by_revision_within_one_epoch(
    cursor: str | None, wanted: str, answer: bool
) -> None:
    assert reached(cursor, wanted) is answer


async def test_a_gateway_serves_from_its_snapshot_before_the_server_is_there(
    tmp_path: Path,
) -> None:
    async with running() as engine:
        async with watch_server() as server:
            fill(server, engine)
            path = tmp_path / "gateway_snapshot.json"
            async with gateway(tmp_path, server.port) as gate:

                async def written() -> bool:
                    return path.exists() and '"id":1' in path.read_text()

                await eventually(written, "the snapshot")
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
            port = server.port
        async with gateway(tmp_path, port, ready=False, from_disk=True) as gate:
            assert (await ask(gate.port, "GET", "/readyz")).status == 200
            assert (await gate.chat()).status == 200


async def test_without_tables_a_gateway_is_not_ready_and_says_so(tmp_path: Path) -> None:
    async with watch_server() as server:
        fill(server)
        server.synced.clear()
        async with gateway(tmp_path, server.port, ready=False) as gate:
            assert (await ask(gate.port, "GET", "/readyz")).status == 503
            assert (await ask(gate.port, "GET", "/healthz")).status == 200
            assert (await gate.chat()).status == 503
            server.synced.set()

            async def ready() -> bool:
                return (await ask(gate.port, "GET", "/readyz")).status == 200

            await eventually(ready, "ready")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"format": 2}', b'{"format":99,"credentials":[],"models":[],'
    b'"instances":[],"workers":[]}',
    b'{"format":2,"credentials":[{"id":1,"kind":"\xff"}]}', b"[" * 3000],
)  # fmt: skip
async def test_a_snapshot_that_is_not_usable_is_ignored_with_a_warning(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "snapshot"
    path.write_bytes(content)
    assert Disk(path).load() is None
    assert "is ignored" in caplog.text


def test_tables_survive_their_way_to_disk() -> None:
    tables = Tables()
    for kind, one in (
        (wire.CREDENTIALS, credential(1, "x", expires_at="2030-01-01T00:00:00Z")),
        (wire.MODELS, model(1, "m")),
        (wire.INSTANCES, instance(1, 1, 40000)),
    ):
        tables.put(kind, json.dumps(one).encode())
    again = Tables.load(tables.dump())
    assert again.credentials == tables.credentials
    assert again.by_digest == tables.by_digest
    assert again.of_model == tables.of_model


def test_a_name_given_to_a_new_model_outlives_the_old_ones_deletion() -> None:
    tables = Tables()
    tables.put(wire.MODELS, json.dumps(model(1, "m")).encode())
    tables.put(wire.MODELS, json.dumps(model(2, "m")).encode())
    tables.delete(wire.MODELS, 1)
    assert tables.by_name["m"].id == 2


def test_an_object_without_its_fields_is_refused() -> None:
    with pytest.raises(msgspec.DecodeError):
        Tables().put(wire.MODELS, b'{"id": 1}')
