import asyncio
import logging
import os
import resource
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from gpustack.errors import NotFound, Unauthorized
from gpustack.forward.metrics import Metric
from gpustack.schemas.engines import Engine, Engines
from gpustack.worker import log_times
from gpustack.worker.api import ROUTES, Api
from gpustack.worker.supervisor.engine_log import log_path, start_log

SECRET = "agent-secret"


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with served(tmp_path, SECRET) as url:
        headers = {"Authorization": f"Bearer {SECRET}"}
        async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False) as client:
            yield client


@asynccontextmanager
async def served(log_dir: Path, secret: str | None) -> AsyncIterator[str]:
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    async with asyncio.TaskGroup() as group:
        api = Api(
            log_dir=log_dir,
            secret=lambda: secret,
            instances=lambda: {7},
            engines=engines,
            metrics=some_metrics,
        )
        task = group.create_task(api.serve(sock))
        yield f"http://127.0.0.1:{port}"
        task.cancel()


async def engines() -> Engines:
    return Engines([Engine(instance_id=7, instance_name="m-abcde", phase="running", pid=9)])


async def some_metrics() -> list[Metric]:
    return [Metric("gpustack_engines", "Engines by state.", ("state",), {("running",): 1})]


def write(log_dir: Path, text: str, *, instance_id: int = 7) -> Path:
    """Add to an instance's log what an engine would."""
    path = log_path(log_dir, instance_id)
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(text)
    return path


async def test_without_the_workers_secret_only_health_is_answered(tmp_path: Path) -> None:
    write(tmp_path, "line\n")
    async with served(tmp_path, SECRET) as url, httpx.AsyncClient(trust_env=False) as client:
        assert (await client.get(f"{url}/healthz")).status_code == 200
        bearer = {"Authorization": "Bearer wrong"}
        for headers in ({}, bearer, {"Authorization": SECRET}, {"Authorization": "Bearer"}):
            for path in (
                "/v2/logs/7", "/v2/logs/8", "/v2/engines", "/metrics", "/debug/log_level",
                "/anything", "/healthz/",
            ):  # fmt: skip
                answer = await client.get(f"{url}{path}", headers=headers)
                assert (answer.status_code, answer.json()["code"]) == (401, Unauthorized.code)
        assert (await client.post(f"{url}/healthz")).status_code == 401


async def test_before_this_worker_registered_no_secret_is_right(tmp_path: Path) -> None:
    for secret in (None, ""):
        async with served(tmp_path, secret) as url, httpx.AsyncClient(trust_env=False) as client:
            for token in ("x", "None", "null", ""):
                headers = {"Authorization": f"Bearer {token}".strip()}
                assert (await client.get(f"{url}/v2/logs/7", headers=headers)).status_code == 401


def test_only_health_is_public() -> None:
    assert [route.pattern for route in ROUTES if route.public] == ["/healthz"]
    assert all(
        route.match(route.method, route.pattern.format(instance_id=7)) is not None
        for route in ROUTES
    )


async def test_a_log_is_sent_whole_or_from_its_last_lines(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    write(tmp_path, "one\ntwo\nthree")
    for tail, text in (
        ("", "one\ntwo\nthree"),
        ("?tail=0", ""),
        ("?tail=1", "three"),
        ("?tail=2", "two\nthree"),
        ("?tail=3", "one\ntwo\nthree"),
        ("?tail=99&follow=false", "one\ntwo\nthree"),
    ):
        answer = await client.get(f"/v2/logs/7{tail}")
        assert (answer.status_code, answer.text) == (200, text), tail
    write(tmp_path, "\n")
    assert (await client.get("/v2/logs/7?tail=1")).text == "three\n"


async def test_lines_that_span_many_pieces_are_counted_right(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    lines = [f"{n} " + "x" * (n * 7919 % 100_000) + "\n" for n in range(40)]
    write(tmp_path, "".join(lines))
    for count in (1, 2, 7, 39, 40, 41):
        answer = await client.get(f"/v2/logs/7?tail={count}")
        assert answer.text == "".join(lines[-count:])


async def test_what_there_is_not_and_what_makes_no_sense_is_said(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    answer = await client.get("/v2/logs/8")
    assert (answer.status_code, answer.json()["code"]) == (404, NotFound.code)
    assert answer.json()["message"] == "instance 8 has no log on this worker"
    write(tmp_path, "line\n")
    answer = await client.get("/v2/logs/7?previous=true")
    assert answer.json()["message"] == "instance 7 has no previous log on this worker"
    for query in ("tail=many", "tail=-1", "tail=%C2%B2", "tail=" + "9" * 5000, "follow=perhaps"):
        answer = await client.get(f"/v2/logs/7?{query}")
        assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")
    assert (await client.get("/v2/logs/../logs/7x")).status_code == 404
    assert (await client.delete("/v2/logs/7")).status_code == 404


async def test_what_runs_here_and_its_metrics_are_told(client: httpx.AsyncClient) -> None:
    (engine,) = (await client.get("/v2/engines")).json()
    assert (engine["instance_name"], engine["pid"], engine["age_s"]) == ("m-abcde", 9, None)
    answer = await client.get("/metrics")
    assert 'gpustack_engines{state="running"} 1.0' in answer.text.splitlines()
    assert answer.headers["content-type"].startswith("text/plain")


async def test_the_agents_log_level_is_read_and_changed_by_name(client: httpx.AsyncClient) -> None:
    before = logging.getLogger().level
    try:
        answer = await client.put("/debug/log_level", content='"error"')
        assert (answer.status_code, answer.text) == (200, "ERROR")
        assert logging.getLogger().level == logging.ERROR
        refused = await client.put("/debug/log_level", content="LOUD")
        assert (refused.status_code, "DEBUG, INFO" in refused.json()["message"]) == (400, True)
        assert (await client.get("/debug/log_level")).text == "ERROR"
    finally:
        logging.getLogger().setLevel(before)


async def test_the_previous_run_has_its_own_log(client: httpx.AsyncClient, tmp_path: Path) -> None:
    write(tmp_path, "first run\n")
    os.close(start_log(log_path(tmp_path, 7)))
    write(tmp_path, "second run\n")
    assert (await client.get("/v2/logs/7?previous=true")).text == "first run\n"
    assert (await client.get("/v2/logs/7")).text == "second run\n"


async def test_runs_before_are_counted_back_from_the_present_one(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    for run in ("one", "two", "three", "four"):
        os.close(start_log(log_path(tmp_path, 7)))
        write(tmp_path, run)
    for previous, text in (
        ("false", "four"),
        ("0", "four"),
        ("true", "three"),
        ("1", "three"),
        ("2&follow=true", "two"),  # it is over: there is nothing to wait for
        ("3&tail=1", "one"),
    ):
        assert (await client.get(f"/v2/logs/7?previous={previous}")).text == text
    answer = await client.get("/v2/logs/7?previous=4")
    assert answer.status_code == 404
    assert "has no log of 4 runs before on this worker: 3 earlier" in answer.json()["message"]


async def test_a_log_is_sent_since_a_time(client: httpx.AsyncClient, tmp_path: Path) -> None:
    path = write(tmp_path, "an hour ago\nstill")
    hour = path.stat().st_size
    write(tmp_path, " then\nhalf an hour ago\n")
    now = time.time()
    assert (await client.get("/v2/logs/7?since=60")).text == path.read_text()  # nobody knows better
    log_times.note(path, now - 3600, hour)
    log_times.note(path, now - 1800, path.stat().st_size)
    for query, text in (
        ("since=60", ""),
        ("since=1799.5", ""),
        ("since=3599", "still then\nhalf an hour ago\n"),  # lines are sent whole
        ("since=3599&tail=1", "half an hour ago\n"),
        ("since=7200", path.read_text()),
        ("since=7200&tail=1", "half an hour ago\n"),
    ):
        assert (await client.get(f"/v2/logs/7?{query}")).text == text, query
    for bad in ("an+hour", "-1", "1e3", "9" * 13):
        assert (await client.get(f"/v2/logs/7?since={bad}")).status_code == 400


async def test_bytes_are_sent_as_the_engine_wrote_them(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    said = b"\x1b[31mred\x1b[0m\r50%\r99%\n\xff\xfe\x00\xe4\xb8\n\x1b]0;title\x07" + b"x" * (
        1 << 20
    )
    log_path(tmp_path, 7).parent.mkdir()
    log_path(tmp_path, 7).write_bytes(said)
    assert (await client.get("/v2/logs/7")).content == said


async def test_a_follower_that_is_far_behind_gets_every_run(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    said = []
    async with asyncio.timeout(10), client.stream("GET", "/v2/logs/7?follow=true") as answer:
        assert answer.status_code == 404
    path = log_path(tmp_path, 7)
    for run in range(3):
        os.close(start_log(path))
        said.append(f"run {run} " + "x" * (1 << 20) + "\n")
        write(tmp_path, said[-1])
    async with asyncio.timeout(10), client.stream("GET", "/v2/logs/7?follow=true") as answer:
        got = bytearray()
        async for piece in answer.aiter_raw():
            got += piece
            if len(said) < 6:  # it reads run 2 while three more come and go
                os.close(start_log(path))
                said.append(f"run {len(said)} " + "x" * (1 << 20) + "\n")
                write(tmp_path, said[-1])
            if len(got) == sum(map(len, said[2:])):
                break
    assert got.decode() == "".join(said[2:])


async def test_following_ends_with_the_instance(tmp_path: Path) -> None:
    write(tmp_path, "last words\n", instance_id=8)
    async with served(tmp_path, SECRET) as url, httpx.AsyncClient(trust_env=False) as client:
        headers = {"Authorization": f"Bearer {SECRET}"}
        answer = await client.get(f"{url}/v2/logs/8?follow=true", headers=headers, timeout=5)
        assert answer.text == "last words\n"


async def test_a_followed_log_goes_on_through_new_runs_and_cuts(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    path = write(tmp_path, "a\nb\n")
    async with asyncio.timeout(10), client.stream("GET", "/v2/logs/7?tail=1&follow=true") as answer:
        lines = answer.aiter_lines()
        assert await anext(lines) == "b"
        write(tmp_path, "c\n")
        assert await anext(lines) == "c"
        write(tmp_path, "the end\n")
        os.close(start_log(path))
        write(tmp_path, "a new run\n")
        assert await anext(lines) == "the end"
        assert await anext(lines) == "a new run"
        os.truncate(path, 0)
        await asyncio.sleep(0.3)  # who cuts and writes in one breath cannot be told from an append
        write(tmp_path, "cut\n")
        assert await anext(lines) == "cut"


async def test_following_ends_when_the_client_leaves(tmp_path: Path) -> None:
    write(tmp_path, "a\n")
    async with served(tmp_path, SECRET) as url:
        headers = {"Authorization": f"Bearer {SECRET}"}
        async with (
            httpx.AsyncClient(trust_env=False, headers=headers) as client,
            client.stream("GET", f"{url}/v2/logs/7?follow=true") as answer,
        ):
            assert await anext(answer.aiter_bytes()) == b"a\n"
            before = len(asyncio.all_tasks())
        async with asyncio.timeout(5):
            while len(asyncio.all_tasks()) >= before:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_a_log_of_gigabytes_takes_no_memory(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    path = write(tmp_path, "")
    with path.open("ab") as file:
        file.truncate(4 << 30)  # a hole: it takes no disk
        file.seek(0, os.SEEK_END)
        file.write(b"\nlast\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (await client.get("/v2/logs/7?tail=1")).text == "last\n"
    async with client.stream("GET", "/v2/logs/7") as answer:
        got = 0
        async for piece in answer.aiter_raw():
            got += len(piece)
            if got > 256 << 20:
                break
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 32 << 10


async def test_following_ends_when_the_log_is_removed(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    path = write(tmp_path, "a\n")
    async with asyncio.timeout(5), client.stream("GET", "/v2/logs/7?follow=true") as answer:
        pieces = answer.aiter_bytes()
        assert await anext(pieces) == b"a\n"
        path.unlink()
        assert [piece async for piece in pieces] == []
