"""Usage: requests, their sums, and what the dashboard makes of them."""

import asyncio
import random
import time
from collections import Counter
from typing import Any

import httpx
import pytest

from gpustack.server import load
from gpustack.server.db import tables
from tests.server.conftest import PASSWORD, Plane

DAY_S = 86_400
FIRST = 20_000 * DAY_S  # 2024-10-04
MIB = 1024**2


def record(**more: Any) -> dict[str, Any]:
    known = {
        "request_id": "r", "credential_id": None, "user_id": 1, "model_id": 1, "model": "m",
        "operation": "chat/completions", "prompt_tokens": 10, "completion_tokens": 1,
        "status": 200, "started_at": float(FIRST),
    }  # fmt: skip
    return known | more


async def send(plane: Plane, *records: dict[str, Any], sequence: int = 1) -> None:
    gateway = await plane.gateway()
    batch = {"spool": "0" * 32, "sequence": sequence, "records": list(records)}
    answer = await gateway.post("/v2/usage", json=batch)
    assert answer.status_code == 204, answer.text


async def items(http: httpx.AsyncClient, path: str, **asked: Any) -> list[dict[str, Any]]:
    answer = await http.get(path, params=asked)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["items"])


async def sums(http: httpx.AsyncClient, *fields: str, **asked: Any) -> list[tuple[Any, ...]]:
    found = await items(http, "/v2/usage/sums", **asked)
    return [tuple(one[field] for field in fields) for one in found]


async def test_requests_are_listed_newest_first_with_names(plane: Plane) -> None:
    admin = await plane.admin()
    key = (await admin.post("/v2/api-keys", json={"name": "laptop"})).json()
    with_key = record(credential_id=key["id"], started_at=FIRST + 1.5, total_ms=20.5)
    gone = record(request_id="g", user_id=77, credential_id=88, status=500, cut=True)
    await send(plane, gone, with_key)
    newest, oldest = await items(admin, "/v2/usage")
    assert newest["started_at"] == "2024-10-04T00:00:01.500Z"
    assert (newest["user_name"], newest["credential_name"]) == ("admin", "laptop")
    assert (newest["model_name"], newest["prompt_token_count"]) == ("m", 10)
    assert (newest["completed"], newest["total_ms"]) == (True, 20.5)
    assert (oldest["user_id"], oldest["user_name"], oldest["completed"]) == (77, None, False)


async def test_requests_are_filtered_by_all_that_they_are(plane: Plane) -> None:
    admin = await plane.admin()
    await send(
        plane,
        record(request_id="a", model_id=2, started_at=FIRST - 0.5),
        record(request_id="b", user_id=2, operation="embeddings"),
        record(request_id="c", cut=True, started_at=FIRST + DAY_S - 0.5, prompt_tokens=99),
        record(request_id="d", started_at=float(FIRST + DAY_S)),
    )

    async def found(**asked: Any) -> str:
        return "".join(one["request_id"] for one in await items(admin, "/v2/usage", **asked))

    assert await found() == "dcba"
    assert await found(model_id=2) == "a"
    assert await found(user_id=2) == await found(operation="embeddings") == "b"
    assert await found(cut=True) == "c"
    assert await found(start_date="2024-10-04", end_date="2024-10-04") == "cb"
    assert await found(start_date="2024-10-05") == "d"
    assert await found(sort_by="-prompt_token_count", perPage=1) == "c"
    for extreme in ("0001-01-01", "9999-12-31"):
        assert await found(start_date=extreme, end_date=extreme) == ""
        assert await sums(admin, "request_count", start_date=extreme, end_date=extreme) == [(0,)]


async def test_sums_are_made_by_what_is_asked_for(plane: Plane) -> None:
    admin = await plane.admin()
    key = (await admin.post("/v2/api-keys", json={"name": "laptop"})).json()["id"]
    await send(plane, record(credential_id=key), record(), record(user_id=None, status=503))
    later = {"started_at": float(FIRST + DAY_S)}
    await send(plane, record(**later), record(model_id=2, model="n", **later), sequence=2)
    counts = ("request_count", "failed_count", "prompt_token_count", "completion_token_count")
    assert await sums(admin, *counts) == [(5, 1, 50, 5)]
    assert await sums(admin, "date", "request_count", group_by="date") == [
        ("2024-10-04", 3),
        ("2024-10-05", 2),
    ]
    assert await sums(admin, "model_id", "model_name", "request_count", group_by="model") == [
        (1, "m", 4),
        (2, "n", 1),
    ]
    assert await sums(admin, "user_id", "user_name", "request_count", group_by="user") == [
        (None, None, 1),
        (1, "admin", 4),
    ]
    assert await sums(admin, "credential_name", "request_count", group_by="credential") == [
        (None, 4),
        ("laptop", 1),
    ]
    by_both = {"group_by": ["date", "model"], "sort_by": "-date,request_count"}
    assert await sums(admin, "date", "model_id", "request_count", **by_both) == [
        ("2024-10-05", 1, 1),
        ("2024-10-05", 2, 1),
        ("2024-10-04", 1, 3),
    ]
    assert await sums(admin, "model_id", group_by="date") == [(None,), (None,)]
    assert await sums(admin, "request_count", model_id=2) == [(1,)]
    second = (await admin.get("/v2/usage/sums?group_by=date&perPage=1&page=2")).json()
    assert [one["date"] for one in second["items"]] == ["2024-10-05"]
    assert second["pagination"] == {"page": 2, "perPage": 1, "total": 2, "totalPage": 2}


async def test_sums_are_those_of_the_requests_however_they_came(plane: Plane) -> None:
    """Batches of every size, some of them twice, from several gateways at once."""
    dice, admin = random.Random(7), await plane.admin()
    expected: Counter[tuple[Any, ...]] = Counter()
    gateway = await plane.gateway()
    batches = []
    for spool in range(3):
        for sequence in range(1, 5):
            records = [
                record(
                    user_id=dice.choice([None, 1, 2]),
                    model_id=dice.choice([1, 2]),
                    started_at=FIRST + dice.random() * 5 * 3600,
                    prompt_tokens=dice.randrange(100),
                )
                for _ in range(dice.randrange(1, 40))
            ]
            batches.append((spool, sequence, records))
            for one in records:
                expected[one["model_id"], one["user_id"]] += one["prompt_tokens"]

    async def one_spool(spool: int) -> None:
        for of, sequence, records in batches:
            for _ in range(2 if of == spool else 0):
                batch = {"spool": f"{of:032x}", "sequence": sequence, "records": records}
                answer = await gateway.post("/v2/usage", json=batch)
                assert answer.status_code == 204, answer.text

    await asyncio.gather(*map(one_spool, range(3)))
    fields = ("model_id", "user_id", "prompt_token_count")
    found = await sums(admin, *fields, group_by=["model", "user"])
    assert {(model, user): tokens for model, user, tokens in found} == dict(expected)
    total = sum(len(records) for _, _, records in batches)
    assert (await admin.get("/v2/usage?perPage=1")).json()["pagination"]["total"] == total
    async with plane.db.read() as session:
        assert await session.get(tables.UsageHour, 3 * 5 * 2 + 1) is None  # a row per hour and kind


async def test_users_see_their_own_usage_and_administrators_all(plane: Plane) -> None:
    admin = await plane.admin()
    await admin.post("/v2/users", json={"username": "eve", "password": PASSWORD})
    await send(plane, record(user_id=1), record(user_id=2, prompt_tokens=7))
    eve = await plane.through_gateway()
    await eve.post("/auth/login", data={"username": "eve", "password": PASSWORD})
    assert [one["user_id"] for one in await items(eve, "/v2/usage")] == [2]
    assert await sums(eve, "prompt_token_count") == [(7,)]
    assert await sums(eve, "prompt_token_count", user_id=1) == [(0,)]
    assert (await eve.get("/v2/dashboard")).status_code == 403


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt_tokens": -1}, {"prompt_tokens": 2**31}, {"started_at": 1e300}, {"model_id": 0},
        {"operation": "x" * 65}, {"credential_id": 2**63}, {"total_ms": -1.0},
    ],
)  # fmt: skip
async def test_a_record_that_cannot_be_stored_is_refused(plane: Plane, wrong: Any) -> None:
    batch = {"spool": "0" * 32, "sequence": 1, "records": [record(**wrong)]}
    answer = await (await plane.gateway()).post("/v2/usage", json=batch)
    assert answer.status_code == 422
    assert f"records.0.{next(iter(wrong))}" in answer.json()["message"]


# --- the dashboard ---------------------------------------------------------------------------


async def test_the_dashboard_counts_what_there_is(plane: Plane) -> None:
    admin = await plane.admin()
    gpu = {"index": 0, "vendor": "NVIDIA", "memory_total_bytes": 100 * MIB}
    await plane.worker("a", gpu_devices=[gpu, gpu | {"index": 1}])
    await plane.worker("b")
    spec = {"source": "local_path", "local_path": "/m.gguf", "replicas": 0}
    for name, categories in (("m", ["llm"]), ("n", [])):
        await admin.post("/v2/models", json=spec | {"name": name, "categories": categories})
    claims: list[dict[str, Any]] = [
        {"ram_bytes": 5},
        {"ram_bytes": 7, "vram_bytes": {"0": 1, "1": 2}},
    ]
    async with plane.db.write() as session:
        for number, claim in enumerate(claims):
            place: dict[str, Any] = {
                "model_id": 1,
                "version_id": 1,
                "worker_id": 1,
                "deleting": True,
            }
            session.add(tables.Instance(name=f"m-{number}", claim=claim, **place))
    await send(plane, record(user_id=1, started_at=time.time()))
    shown = (await admin.get("/v2/dashboard")).json()
    assert shown["resource_counts"] == {
        "worker_count": 2, "gpu_count": 2, "model_count": 2, "model_instance_count": 2
    }  # fmt: skip
    assert shown["active_models"] == [
        {
            "id": 1, "name": "m", "categories": ["llm"], "instance_count": 2, "token_count": 11,
            "resource_claim": {"ram": 12, "vram": 3},
        }
    ]  # fmt: skip
    (today,) = shown["model_usage"]["api_request_history"]
    assert today == {"timestamp": int(time.time() // DAY_S * DAY_S), "value": 1}
    assert shown["model_usage"]["top_users"] == [
        {"user_id": 1, "username": "admin", "prompt_token_count": 10, "completion_token_count": 1}
    ]


async def test_load_is_that_of_machines_and_devices_that_are_heard_of(plane: Plane) -> None:
    admin = await plane.admin()
    gpu = {"index": 0, "vendor": "NVIDIA", "memory_total_bytes": 100 * MIB}
    busy = gpu | {"memory_used_bytes": 60 * MIB, "utilization_percent": 90.0}
    idle = gpu | {"index": 1, "utilization_percent": 0.0}
    ram = {"memory_total_bytes": 1000 * MIB, "cpu_percent": 30.0}
    await plane.worker("a", gpu_devices=[busy, idle], memory_used_bytes=500 * MIB, **ram)
    await plane.worker("b", gpu_devices=[busy], **ram | {"cpu_percent": 10.0})
    await plane.app.state.heartbeats.write(plane.db)  # as every ten seconds
    load_now = (await admin.get("/v2/dashboard")).json()["system_load"]["current"]
    assert load_now == {"cpu": 20.0, "ram": 25.0, "gpu": 60.0, "vram": 40.0}


async def test_the_load_of_each_minute_is_kept_for_an_hour_and_once(plane: Plane) -> None:
    admin = await plane.admin()
    await plane.worker("a", cpu_percent=50.0)
    await plane.app.state.heartbeats.write(plane.db)
    minute = load.this_minute() + 100  # the server keeps its own meanwhile
    async with plane.db.write() as session:
        session.add_all(tables.LoadSample(minute=minute - age, cpu=1.0) for age in (60, 59))
    for _ in range(2):
        await load.sample(plane.db, minute)
    history = (await admin.get("/v2/dashboard")).json()["system_load"]["history"]
    points = [(one["timestamp"], one["value"]) for one in history["cpu"]]
    assert points == [((minute - 59) * 60, 1.0), (minute * 60, 50.0)]
    assert history["gpu"] == []  # there is none


async def test_stats_are_of_the_days_models_and_users_that_are_asked_for(plane: Plane) -> None:
    admin = await plane.admin()
    later = {"started_at": float(FIRST + DAY_S)}
    await send(plane, record(), record(user_id=2), record(model_id=2, **later), record(**later))

    async def requests(**asked: Any) -> list[tuple[int, float]]:
        between = {"start_date": "2024-10-01", "end_date": "2024-10-31"}
        answer = await admin.get("/v2/dashboard/usage/stats", params=between | asked)
        assert answer.status_code == 200, answer.text
        points = answer.json()["api_request_history"]
        return [(one["timestamp"] - FIRST, one["value"]) for one in points]

    assert await requests() == [(0, 2), (DAY_S, 2)]
    assert await requests(end_date="2024-10-04") == [(0, 2)]
    assert await requests(model_ids=[2]) == [(DAY_S, 1)]
    assert await requests(user_ids=[2]) == [(0, 1)]
    assert await requests(user_ids=[1, 2], model_ids=[1]) == [(0, 2), (DAY_S, 1)]
    usage = (
        await admin.get("/v2/dashboard/usage?start_date=2024-10-01&end_date=2024-10-31")
    ).json()
    assert [one["user_id"] for one in usage["top_users"]] == [1, 2]
    for extreme in ("0001-01-01", "9999-12-31"):
        assert await requests(start_date=extreme, end_date=extreme) == []
        answer = await admin.get(f"/v2/dashboard/usage?end_date={extreme}")
        assert answer.status_code == 200
    wrong = await admin.get("/v2/dashboard/usage?start_date=2024-10-02&end_date=2024-10-01")
    assert wrong.json()["message"] == "start_date 2024-10-02 is after end_date 2024-10-01"
