"""Usage: counted from the engine's words, kept on disk, delivered once."""

import asyncio
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gpustack.gateway.delivery import Delivery
from gpustack.gateway.spool import BATCH_RECORDS, Record, Spool
from gpustack.lib.secrets import new_secret
from gpustack.schemas.usage import UsageBatch, UsageRecord
from tests.support.data_plane import AUTH, fill, gateway
from tests.support.openai_engine import Seen, Wire, content_events, running, streaming
from tests.support.raw_http import Client
from tests.support.wait import eventually
from tests.support.watch_server import watch_server

STREAM = {"model": "m", "stream": True}


def record(name: str = "", **more: Any) -> Record:
    facts = {"model_id": 1, "model": "m", "operation": "completions", "started_at": 1.0}
    return Record(request_id=name or new_secret(), **facts | more)  # type: ignore[arg-type]


def ends(spool: Spool) -> list[str]:
    found = []
    while (batch := spool.next_batch()) is not None:
        found += [one.request_id for one in batch.records]
        spool.acked()
    return found


def test_a_record_is_what_the_server_takes_field_by_field() -> None:
    theirs = UsageRecord.model_fields
    assert {name: str(kind) for name, kind in Record.__annotations__.items()} == {
        name: str(field.annotation) for name, field in theirs.items()
    }
    required = {name for name, known in theirs.items() if known.is_required()}
    only_required = record("a")
    parsed = UsageRecord.model_validate_json(json.dumps(_json(only_required)))
    assert parsed.model_dump(exclude=set(theirs) - required) == {
        name: getattr(only_required, name) for name in required
    }


def _json(one: Record) -> Any:
    return json.loads(msgspec.json.encode(one))


# --- what is counted -----------------------------------------------------------------------


async def test_the_engines_own_counts_are_recorded(tmp_path: Path) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            await gate.chat()
            engine.answer = streaming(3)
            await gate.chat(STREAM)
            await gate.chat({**STREAM, "stream_options": {"include_usage": True}})
            await gate.delivery.step()
            assert len(server.records()) == 3
            for one in server.records():
                UsageBatch.model_validate(server.usage[0])
                assert (one["prompt_tokens"], one["completion_tokens"]) == (7, 5)
                assert (one["model_id"], one["instance_id"], one["credential_id"]) == (1, 1, 1)
                assert one["operation"] == "chat/completions"
                assert one["status"] == 200
                assert "estimated" not in one
                assert one["total_ms"] >= one["first_byte_ms"] >= 0


async def test_counts_that_no_engine_gave_are_marked_as_estimated(tmp_path: Path) -> None:
    async def answer(seen: Seen, wire: Wire) -> None:
        await wire.json({"data": "x" * 400})

    async with watch_server() as server, running(answer) as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            await gate.chat({"model": "m", "prompt": "y" * 400})
            await gate.delivery.step()
            (one,) = server.records()
            assert one["estimated"] is True
            assert 90 < one["prompt_tokens"] < 120
            assert 90 < one["completion_tokens"] < 120


async def test_an_engines_refusal_costs_nothing(tmp_path: Path) -> None:
    async def answer(seen: Seen, wire: Wire) -> None:
        await wire.json({"error": "no"}, 400)

    async with watch_server() as server, running(answer) as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            await gate.chat()
            await gate.delivery.step()
            (one,) = server.records()
            assert one["status"] == 400
            assert "prompt_tokens" not in one


async def test_a_stream_that_its_client_leaves_is_cut_and_estimated(tmp_path: Path) -> None:
    async with watch_server() as server, running(streaming(1000, 0.01)) as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            client = await Client.to(gate.port)
            client.ask("POST", "/v1/chat/completions", AUTH, json.dumps(STREAM).encode())
            await client.head()
            for _ in range(3):
                await client.chunk()
            client.abort()

            async def delivered() -> bool:
                await gate.delivery.step()
                return bool(server.records())

            await eventually(delivered, "the record")
            (one,) = server.records()
            assert one["cut"] is True
            assert one["estimated"] is True
            assert one["completion_tokens"] >= 3


async def test_a_stream_that_its_engine_breaks_is_cut(tmp_path: Path) -> None:
    async def die(seen: Seen, wire: Wire) -> None:
        await wire.stream_head()
        await wire.chunk(content_events(1)[0])
        await asyncio.sleep(0.02)
        wire.die()

    async with watch_server() as server, running(die) as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            await gate.chat(STREAM)
            await gate.delivery.step()
            assert server.records()[0]["cut"] is True


# --- how it is kept and delivered ------------------------------------------------------------


async def test_usage_waits_on_disk_while_the_server_is_away(tmp_path: Path) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            server.usage_status = 503
            for _ in range(3):
                await gate.chat()
                await gate.delivery.step()
            assert not server.records()
            server.usage_status = 204
            await gate.delivery.step()
            assert len(server.records()) == 3
            await gate.delivery.step()
            assert len(server.records()) == 3


async def test_a_batch_is_the_same_batch_until_it_is_acknowledged(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path)
    spool.end(record("a"))
    first = spool.next_batch()
    spool.end(record("b"))
    again = spool.next_batch()
    assert first == again
    spool.acked()
    after = spool.next_batch()
    assert after is not None
    assert first is not None
    assert (after.sequence, [one.request_id for one in after.records]) == (
        first.sequence + 1,
        ["b"],
    )
    spool.close()


def test_a_batch_has_a_thousand_records_at_most(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path)
    names = [f"r{number}" for number in range(2 * BATCH_RECORDS + 5)]
    for name in names:
        spool.start(record(name))
        spool.end(record(name))
    sizes = []
    found = []
    while (batch := spool.next_batch()) is not None:
        sizes.append(len(batch.records))
        found += [one.request_id for one in batch.records]
        spool.acked()
    assert sizes == [BATCH_RECORDS, BATCH_RECORDS, 5]
    assert found == names
    spool.close()


def _life_that_dies(folder: Path) -> None:
    """A process that is killed with one batch sent and not acknowledged, and one request open."""
    spool = Spool.create(folder)
    spool.start(record("open", prompt_tokens=11))
    spool.start(record("done"))
    spool.end(record("done"))
    assert spool.next_batch() is not None
    spool.end(record("later"))
    os._exit(9)


def test_what_a_killed_process_left_is_sent_under_its_own_numbers(tmp_path: Path) -> None:
    if (pid := os.fork()) == 0:
        _life_that_dies(tmp_path)
    os.waitpid(pid, 0)
    (spool,) = Spool.left_over(tmp_path)
    first = spool.next_batch()
    assert first is not None
    assert (first.sequence, [one.request_id for one in first.records]) == (1, ["done"])
    spool.acked()
    second = spool.next_batch()
    assert second is not None
    assert second.sequence == 2
    assert [one.request_id for one in second.records] == ["later", "open"]
    cut = second.records[1]
    assert (cut.cut, cut.estimated, cut.prompt_tokens) == (True, True, 11)
    spool.acked()
    spool.close()
    assert not list(tmp_path.iterdir())


def test_a_spool_whose_process_lives_is_left_alone(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path)
    spool.end(record())
    assert not list(Spool.left_over(tmp_path))
    spool.close()
    (left,) = Spool.left_over(tmp_path)
    left.close()


def test_half_a_line_at_the_end_of_a_left_over_spool_spoils_nothing(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path)
    spool.end(record("a"))
    spool.close()
    path = tmp_path / spool.id
    path.write_bytes(path.read_bytes() + b'{"end":{"request_id":"b","mod')
    (left,) = Spool.left_over(tmp_path)
    left.end(record("c"))
    assert ends(left) == ["a", "c"]
    left.close()


def test_a_broken_letter_in_one_left_over_spool_stops_neither_it_nor_the_others(
    tmp_path: Path,
) -> None:
    broken, other = Spool.create(tmp_path), Spool.create(tmp_path)
    for spool in (broken, other):
        spool.end(record("a"))
        spool.end(record("b"))
        spool.close()
    path = tmp_path / broken.id
    path.write_bytes(path.read_bytes().replace(b'"request_id":"a"', b'"request_id":"\xff"'))
    (tmp_path / ("0" * 32)).mkdir()  # nobody can open it for writing
    found = {left.id: left for left in Spool.left_over(tmp_path)}
    assert ends(found[broken.id]) == ["b"]
    assert ends(found[other.id]) == ["a", "b"]
    for left in found.values():
        left.close()


@contextmanager
def disk_with(bytes_left: int, path: Path) -> Iterator[None]:
    """`path` can grow by so much: what would pass the limit is written short, then fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + bytes_left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_in_a_record_leaves_no_half_of_it(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path)
    path = tmp_path / spool.id
    spool.end(record("a"))
    with disk_with(20, path):
        spool.end(record("lost"))
    spool.end(record("b"))
    assert spool.dropped == 1
    assert all(json.loads(line) for line in path.read_text().splitlines())
    assert ends(spool) == ["a", "b"]
    spool.close()


def test_a_batch_that_cannot_be_written_down_is_not_sent_and_not_lost(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path)
    path = tmp_path / spool.id
    spool.end(record("a"))
    with disk_with(5, path):
        with pytest.raises(OSError, match="takes no more"):
            spool.next_batch()
        spool.close()
    assert path.exists()
    (left,) = Spool.left_over(tmp_path)
    assert ends(left) == ["a"]
    left.close()


def test_a_spool_is_never_replaced_by_a_part_of_itself(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path)
    path = tmp_path / spool.id
    for _ in range(14_000):
        spool.end(record())
    spool.start(record("open"))
    last = 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    while (batch := spool.next_batch()) is not None:
        last = batch.sequence
        spool_size = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            spool.acked()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.stat().st_size == spool_size
    spool.end(record("new"))
    batch = spool.next_batch()
    assert batch is not None
    assert (batch.sequence, [one.request_id for one in batch.records]) == (last + 1, ["new"])
    assert [one.name for one in tmp_path.iterdir()] == [spool.id]
    spool.close()


def test_a_full_spool_counts_what_it_drops(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path, limit_bytes=2000)
    for _ in range(100):
        spool.end(record())
    kept = len(ends(spool))
    assert 0 < kept < 100
    assert spool.dropped == 100 - kept
    spool.close()


def test_what_is_acknowledged_leaves_the_disk_and_what_is_not_stays(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path)
    path = tmp_path / spool.id
    spool.start(record("open"))
    for _ in range(12_000):
        spool.end(record())
    large = path.stat().st_size
    last = 0
    while (batch := spool.next_batch()) is not None:
        last = batch.sequence
        spool.acked()
    spool.end(record("new"))
    assert path.stat().st_size < large / 2
    batch = spool.next_batch()
    assert batch is not None
    assert batch.sequence == last + 1
    spool.close()
    (left,) = Spool.left_over(tmp_path)
    again = left.next_batch()
    assert again is not None
    assert again.sequence == last + 1
    assert [one.request_id for one in again.records] == ["new"]
    left.acked()
    assert ends(left) == ["open"]
    left.close()


@pytest.mark.parametrize("status", [400, 422])
async def test_a_batch_that_the_server_cannot_read_does_not_hold_up_the_others(
    tmp_path: Path, status: int
) -> None:
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            await gate.chat()
            server.usage_status = status
            await gate.delivery.step()
            server.usage_status = 204
            await gate.chat()
            await gate.delivery.step()
            assert len(server.records()) == 1


async def test_left_over_usage_is_sent_before_this_lifes(tmp_path: Path) -> None:
    old = Spool.create(tmp_path / "usage")
    old.end(record("old"))
    old.close()
    async with watch_server() as server, running() as engine:
        fill(server, engine)
        async with gateway(tmp_path, server.port) as gate:
            await gate.chat()
            assert isinstance(gate.delivery, Delivery)
            await gate.delivery.step()
            assert [batch["spool"] for batch in server.usage] == [old.id, gate.spool.id]
            assert not (tmp_path / "usage" / old.id).exists()
