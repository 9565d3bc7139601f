"""What cannot be asked, whichever route it is sent to: refused in one shape, with its place."""

import json
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.types import Message

from gpustack.server.api.context import BODY_BYTES
from tests.server.conftest import JOIN, LOCAL_ADMIN, Plane, registration

MODEL = {"name": "m", "source": "local_path", "local_path": "/m.gguf"}
JSON = {"Content-Type": "application/json"}
DEEP = "[" * 900 + "]" * 900


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"system_reserved_vram_bytes": 2**70},
            "system_reserved_vram_bytes: want an integer of at most 64 bits",
        ),
        ({"port": True}, "port: Input should be a valid integer"),
        ({"port": "10150"}, "port: Input should be a valid integer"),
        (
            {"labels": {"a": "b\0"}},
            "labels.a: a text holds NUL or half a surrogate pair, which is no character",
        ),
        (
            {"labels": {"\ud800": "b"}},
            "labels: a text holds NUL or half a surrogate pair, which is no character",
        ),
    ],
)
async def test_what_cannot_be_kept_is_refused_with_its_place(
    plane: Plane, more: dict[str, Any], message: str
) -> None:
    joiner = await plane.client(JOIN)
    body = json.dumps(registration("w9", **more)).encode()
    answer = await joiner.post("/v2/workers/register", content=body, headers=JSON)
    assert (answer.status_code, answer.json()["message"]) == (422, message)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ({"memory_total_bytes": 2**64}, "want an integer of at most 64 bits"),
        ({"utilization_percent": float("nan")}, "want a finite number"),
        ({"utilization_percent": float("inf")}, "want a finite number"),
        ({"memory_used_bytes": False}, "Input should be a valid integer"),
    ],
)
async def test_a_worker_cannot_report_what_could_not_be_shown(
    plane: Plane, device: dict[str, Any], message: str
) -> None:
    agent = await plane.worker()
    gpu = {"index": 0, "vendor": "NVIDIA", "memory_total_bytes": 1} | device
    status = {"os": "linux", "arch": "x86_64", "cpu_count": 2, "memory_total_bytes": 1}
    body = json.dumps(status | {"gpu_devices": [gpu]}).encode()
    answer = await agent.http.put(f"/v2/workers/{agent.id}/status", content=body, headers=JSON)
    assert answer.status_code == 422
    assert answer.json()["message"] == f"gpu_devices.0.{next(iter(device))}: {message}"
    assert (await (await plane.admin()).get("/v2/workers")).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v2/models", f'{{"name": {DEEP}}}'),
        ("POST", "/v2/apply", DEEP),
        ("PATCH", "/v2/models/1", f'{{"env": {DEEP}}}'),
        ("PATCH", "/v2/models/1", '{"env": ' + '{"a": ' * 900 + "1" + "}" * 901),
    ],
)
async def test_a_body_may_be_as_deep_as_it_likes(
    plane: Plane, method: str, path: str, body: str
) -> None:
    admin = await plane.admin()
    assert (await admin.post("/v2/models", json=MODEL)).status_code == 201
    answer = await admin.request(method, path, content=body.encode(), headers=JSON)
    assert answer.status_code in {400, 422}, answer.text
    assert answer.json().keys() == {"code", "message", "detail"}


async def test_a_stranger_is_not_told_what_is_wrong_with_a_body(plane: Plane) -> None:
    stranger = await plane.client()
    for method, path in (
        ("POST", "/v2/models"),
        ("PUT", "/v2/users/x/password"),
        ("POST", "/v2/usage"),
        ("POST", "/v2/workers/register"),
        ("POST", "/auth/update-password"),
    ):
        for body in (b"\xff\xfe\x00", b"{", b"[]", b'{"name": 1}'):
            answer = await stranger.request(method, path, content=body, headers=JSON)
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")


async def test_who_may_not_ask_hears_that_before_what_is_wrong_with_a_body(plane: Plane) -> None:
    agent = await plane.worker()
    answer = await agent.http.post("/v2/models", content=b"{", headers=JSON)
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")


@pytest.mark.parametrize("name", ["a\nb", " ", " a", "a\u202eb", "a\x7f", ""])
async def test_a_name_is_one_line_that_is_shown_as_it_is(plane: Plane, name: str) -> None:
    admin, joiner = await plane.admin(), await plane.client(JOIN)
    for answer in (
        await joiner.post("/v2/workers/register", json=registration(name)),
        await admin.post("/v2/api-keys", json={"name": name}),
    ):
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid")
        assert answer.json()["message"].startswith("name: ")
    for shown in ("räck 3:gpu/é", "节点-1"):
        assert (await admin.post("/v2/api-keys", json={"name": shown})).status_code == 201
        answer = await joiner.post("/v2/workers/register", json=registration(shown))
        assert answer.status_code == 200


async def endless(taken: list[int], size: int = 2**16) -> AsyncIterator[bytes]:
    """A body as long as somebody reads it; 100 MiB at most."""
    for number in range(100 * 2**20 // size):
        taken.append(number)
        yield b" " * size


@pytest.mark.parametrize("path", ["/v2/models", "/v2/workers/register", "/v2/usage", "/v2/apply"])
async def test_of_what_a_stranger_sends_nothing_is_read(plane: Plane, path: str) -> None:
    taken: list[int] = []
    stranger = await plane.client("wrong")
    answer = await stranger.post(path, content=endless(taken), headers=JSON)
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert not taken


@pytest.mark.parametrize(
    ("method", "path", "limit"),
    [
        ("POST", "/v2/models", BODY_BYTES),
        ("POST", "/v2/apply", BODY_BYTES),
        ("PATCH", "/v2/models/1", BODY_BYTES),
        ("PUT", "/v2/users/1/password", BODY_BYTES),
        ("PUT", "/debug/log_level", 2**16),
        ("POST", "/auth/login", 2**16),
    ],
)
async def test_no_more_of_a_body_is_read_than_there_may_be(
    plane: Plane, method: str, path: str, limit: int
) -> None:
    taken: list[int] = []
    admin = await plane.admin()
    answer = await admin.request(method, path, content=endless(taken), headers=JSON)
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large"), answer.text
    assert len(taken) * 2**16 <= limit + 2**16


async def test_a_body_may_be_as_long_as_the_limit(plane: Plane) -> None:
    admin = await plane.admin()
    body = json.dumps({"models": [MODEL], "dry_run": True}).encode().ljust(BODY_BYTES)
    assert (await admin.post("/v2/apply", content=body, headers=JSON)).status_code == 200
    answer = await admin.post("/v2/apply", content=body + b" ", headers=JSON)
    assert answer.status_code == 413


async def test_who_leaves_in_the_middle_of_a_body_is_no_mistake_of_the_server(
    plane: Plane, caplog: pytest.LogCaptureFixture
) -> None:
    coming: list[Message] = [
        {"type": "http.request", "body": b'{"name"', "more_body": True},
        {"type": "http.disconnect"},
    ]
    scope = {
        "type": "http", "method": "POST", "path": "/v2/models", "query_string": b"",
        "headers": [(b"authorization", b"Bearer " + LOCAL_ADMIN.encode())],
    }  # fmt: skip

    async def receive() -> Message:
        return coming.pop(0)

    said: list[Message] = []

    async def send(message: Message) -> None:
        said.append(message)

    await plane.app(scope, receive, send)
    assert said[0]["status"] == 400
    assert not caplog.records


async def test_bytes_that_are_no_text_are_refused_with_a_sentence(plane: Plane) -> None:
    admin = await plane.admin()
    answer = await admin.post("/v2/models", content=b"\xff", headers=JSON)
    said = {"code": "bad_request", "message": "the body cannot be read: want JSON in UTF-8"}
    assert (answer.status_code, answer.json()) == (400, said | {"detail": {}})


async def test_a_day_is_written_out(plane: Plane) -> None:
    admin = await plane.admin()
    for path in ("/v2/usage", "/v2/usage/sums", "/v2/dashboard/usage"):
        for day in ("0", "1700000000", "2026-01-31T00:00:00", "2026-1-31"):
            answer = await admin.get(path, params={"start_date": day})
            assert answer.status_code == 422
            assert answer.json()["message"] == "start_date: want a date such as 2026-01-31"


async def test_a_method_that_a_path_does_not_take_is_refused_with_those_that_it_does(
    plane: Plane,
) -> None:
    admin = await plane.admin()
    for method, path, takes in (
        ("DELETE", "/v2/users/me", "GET, PUT"),
        ("GET", "/v2/workers/register", "POST"),
        ("DELETE", "/v2/usage/sums", "GET"),
        ("PUT", "/v2/models", "DELETE, GET, POST"),
        ("POST", "/v2/models/1", "DELETE, GET, PATCH, PUT"),
    ):
        answer = await admin.request(method, path)
        assert (answer.status_code, answer.json()["code"]) == (405, "method_not_allowed"), path
        assert answer.headers["allow"] == takes
    assert (await admin.get("/v2/users/you")).status_code == 422


async def test_the_shape_of_an_error_never_depends_on_earlier_requests(plane: Plane) -> None:
    admin, stranger = await plane.admin(), await plane.client()
    asked = [
        (admin, "GET", "/v2/models/99", None),
        (admin, "GET", "/v2/models?page=0", None),
        (admin, "GET", "/v2/nothing", None),
        (admin, "PATCH", "/v2/models", None),
        (admin, "POST", "/v2/models", b"\xff"),
        (admin, "POST", "/v2/models", b"{}"),
        (admin, "PATCH", "/v2/models/1", b"no json"),
        (admin, "PUT", "/v2/models/1", json.dumps(MODEL | {"generation": 7}).encode()),
        (admin, "POST", "/v2/models", json.dumps(MODEL).encode()),  # its name is taken
        (admin, "GET", "/v2/watch?kinds=dogs", None),
        (stranger, "GET", "/v2/models", None),
        (stranger, "POST", "/auth/login", b"{}"),
        (stranger, "POST", "/v2/models", b"{"),
    ]
    made = await admin.post("/v2/models", json=MODEL | {"replicas": 0})
    assert made.json()["id"] == 1

    async def answers(order: list[int]) -> dict[int, tuple[int, str]]:
        found = {}
        for number in order:
            client, method, path, body = asked[number]
            answer = await client.request(method, path, content=body, headers=JSON)
            assert answer.status_code >= 400
            assert answer.json().keys() == {"code", "message", "detail"}
            found[number] = (answer.status_code, answer.text)
            assert (await admin.get("/v2/models/1")).status_code == 200
        return found

    order = list(range(len(asked)))
    first = await answers(order)
    for seed in range(5):
        random.Random(seed).shuffle(order)
        assert await answers(order) == first, f"order {order}"


@pytest.mark.parametrize("slip", ["1_0", "10.0", "+10", "%2010", "010", "1e1", "\u0661"])
async def test_an_id_is_written_out(plane: Plane, slip: str) -> None:
    admin = await plane.admin()
    answer = await admin.delete(f"/v2/models/{slip}")
    assert answer.status_code == 422, answer.text
    assert "want an id such as 12" in answer.text
