"""Readiness and liveness of engines: real processes that answer their health path all the time."""

import asyncio
import re
from dataclasses import replace

import pytest

from gpustack.worker.reconcile import Failure, Phase, Trouble
from gpustack.worker.supervisor.asking import Answer
from gpustack.worker.supervisor.engine import Engine
from gpustack.worker.supervisor.engine_log import log_path
from gpustack.worker.supervisor.groups import groups_by_uid
from gpustack.worker.supervisor.probing import Verdict, judge, reason
from tests.support.worker_node import eventually
from tests.worker.supervisor.test_engine import QUICK, Bench, bench

__all__ = ["bench"]

STUCK = replace(QUICK, look_s=0.05, stuck_s=0.3, probe_s=0.3, patience_s=5)


@pytest.mark.parametrize(
    ("status", "body", "verdict"),
    [
        (200, b"{}", Verdict.WORKS),
        (201, b"", Verdict.WORKS),
        (503, b'{"error": {"message": "Loading model"}}', Verdict.LATER),
        (429, b"", Verdict.LATER),
        (401, b"", Verdict.FAILS),
        (403, b"", Verdict.FAILS),
        (404, b'{"detail": "Not Found"}', Verdict.UNKNOWN),
        (404, b'{"message": "The model `org/m` does not exist."}', Verdict.FAILS),
        (404, rb'{"error": "model \"org/m\" not found"}', Verdict.FAILS),
        (404, b"no such path: /org/m/completions", Verdict.UNKNOWN),
        (405, b"", Verdict.UNKNOWN),
        (400, b'{"error": "max_tokens"}', Verdict.UNKNOWN),
        (501, b"", Verdict.UNKNOWN),
        (500, b"", Verdict.FAILS),
        (502, b"", Verdict.FAILS),
        (302, b"", Verdict.FAILS),
    ],
)
def test_what_an_answer_says_of_the_engine(status: int, body: bytes, verdict: Verdict) -> None:
    assert judge(Answer(status, body), "org/m") is verdict


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"code": 500, "message": "no\\u001b[31m logits\\ncan"}}', "no logits can"),
        (b'{"error": "out of memory"}', "out of memory"),
        (b'{"object": "error", "message": "EngineCore died"}', "EngineCore died"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b"Internal Server Error", "Internal Server Error"),
        (b"[1, 2]", "[1, 2]"),
        (b"", ""),
        (b"key s3cret is wrong", "key ******** is wrong"),
        (b"x" * 5000, "x" * 300),
        (b"[" * 60_000, "[" * 300),
    ],
)  # fmt: skip
def test_an_engines_reason_is_one_short_line_without_its_secret(body: bytes, said: str) -> None:
    assert reason(body, secret="s3cret") == said


async def test_an_engine_runs_only_once_it_has_answered_a_real_request(bench: Bench) -> None:
    held = bench.folder / "held"
    held.touch()
    log = log_path(bench.folder / "log", 1)
    async with asyncio.TaskGroup() as group:
        owner = group.create_task(bench.engine.start(bench.plan(fake=f"held-if={held}"), 0))
        await eventually(lambda: log.exists() and "asked" in log.read_text())
        assert bench.phase() is Phase.STARTING
        await bench.engine.stop()
    assert owner.result() is None
    held.unlink()
    async with asyncio.TaskGroup() as group:
        group.create_task(bench.another().start(bench.plan(fake=f"held-if={held}"), 0))
        await eventually(lambda: bench.phase() is Phase.RUNNING)
        assert 'asked /v1/completions {"model":"m","prompt":"1"}' in log.read_text()
        await bench.engine.stop()


async def failed(engine: Engine, bench: Bench, fake: str) -> Failure:
    async with asyncio.timeout(20):
        failure = await engine.start(bench.plan(fake=fake), 0)
    assert failure is not None
    assert groups_by_uid(bench.folder) == {}
    return failure


async def test_an_engine_that_fails_its_first_request_says_how(bench: Bench) -> None:
    failure = await failed(bench.engine, bench, "post=500")
    assert failure.trouble is Trouble.UNFIT
    assert failure.sentence == (
        "/health answers, but the first request (POST /v1/completions) got 500: "
        "head_dim=16 is not supported"
    )
    assert Phase.RUNNING not in bench.seen
    log = log_path(bench.folder / "log", 1).read_text()
    assert log.count("asked /v1/completions") == 3  # once may be chance


async def test_a_first_request_that_never_ends_is_a_failure(bench: Bench) -> None:
    held = bench.folder / "held"
    held.touch()
    engine = bench.another(replace(QUICK, first_s=0.3))
    failure = await failed(engine, bench, f"held-if={held}")
    assert failure.trouble is Trouble.UNFIT
    assert failure.sentence == (
        "/health answers, but the first request (POST /v1/completions) got no answer in 0.3 s"
    )


async def test_an_engine_that_puts_off_its_first_request_is_asked_again(bench: Bench) -> None:
    later = bench.folder / "later"
    later.touch()
    log = log_path(bench.folder / "log", 1)
    async with asyncio.TaskGroup() as group:
        group.create_task(bench.engine.start(bench.plan(fake=f"later-if={later}"), 0))
        await eventually(lambda: log.exists() and log.read_text().count("asked") >= 2)
        assert bench.phase() is Phase.STARTING
        later.unlink()
        await eventually(lambda: bench.phase() is Phase.RUNNING)
        await bench.engine.stop()


@pytest.mark.slow
async def test_an_engine_may_put_off_its_first_request_as_long_as_its_start_may_take(
    bench: Bench,
) -> None:
    later = bench.folder / "later"
    later.touch()
    failure = await failed(bench.engine, bench, f"later-if={later}")
    assert failure.trouble is Trouble.UNFIT
    assert failure.sentence.endswith("(POST /v1/completions) got 503")


async def test_an_engine_without_such_a_path_runs_all_the_same(bench: Bench) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(bench.engine.start(bench.plan(fake="post=404"), 0))
        await eventually(lambda: bench.phase() is Phase.RUNNING)
        await bench.engine.stop()


@pytest.mark.parametrize("adopted", [False, True])
async def test_an_engine_whose_requests_stop_getting_on_is_ended_with_evidence(
    bench: Bench, adopted: bool
) -> None:
    hung = bench.folder / "hung"
    fake = f"busy-if={hung} still-if={hung} held-if={hung}"
    engine = bench.another(STUCK)
    async with asyncio.TaskGroup() as group:
        owner = group.create_task(engine.start(bench.plan(fake=fake), 0))
        await eventually(lambda: bench.phase() is Phase.RUNNING)
        if adopted:
            owner.cancel()
            await asyncio.wait([owner])
            (record,) = bench.records.all()
            owner = group.create_task(bench.another(STUCK).adopt(record))
            await eventually(lambda: bench.phase() is Phase.RUNNING)
        hung.touch()
        failure = await owner
    assert failure is not None
    assert failure.trouble is Trouble.UNHEALTHY
    assert failure.ran_s is not None
    assert re.fullmatch(
        r"1 requests in progress and no token for \d+ s; "
        r"a probe request \(POST /v1/completions\) got no answer in 0.3 s",
        failure.sentence,
    )
    assert groups_by_uid(bench.folder) == {}


async def test_an_engine_that_does_not_count_its_requests_is_stuck_while_somebody_is_connected(
    bench: Bench,
) -> None:
    hung = bench.folder / "hung"
    engine = bench.another(STUCK)
    async with asyncio.TaskGroup() as group:
        fake = f"uncounted still-if={hung} held-if={hung}"
        plan = bench.plan(fake=fake)
        owner = group.create_task(engine.start(plan, 0))
        await eventually(lambda: bench.phase() is Phase.RUNNING)
        hung.touch()
        (record,) = bench.records.all()
        _, writer = await asyncio.open_connection("127.0.0.1", record.port)
        failure = await owner
        writer.close()
    assert failure is not None
    assert failure.sentence.startswith("1 connections open and no token for ")


@pytest.mark.parametrize("sign", ["it answers a real request", "its counters move"])
async def test_an_engine_that_is_but_busy_is_left_alone(bench: Bench, sign: str) -> None:
    busy = bench.folder / "busy"
    words = ["still-if"] if sign == "it answers a real request" else ["held-if"]
    fake = " ".join(f"{word}={busy}" for word in ["busy-if", *words])
    log = log_path(bench.folder / "log", 1)
    engine = bench.another(replace(STUCK, probe_s=30))
    async with asyncio.TaskGroup() as group:
        owner = group.create_task(engine.start(bench.plan(fake=fake), 0))
        await eventually(lambda: bench.phase() is Phase.RUNNING)
        before = log.read_text().count("asked")
        busy.touch()
        if words == ["still-if"]:
            await eventually(lambda: log.read_text().count("asked") >= before + 2)
        else:
            looks = log.read_text().count("metrics")
            await eventually(lambda: log.read_text().count("metrics") >= looks + 12)
            assert log.read_text().count("asked") == before
        assert not owner.done()
        assert bench.phase() is Phase.RUNNING
        busy.unlink()
        await engine.stop()
    assert owner.result() is None
