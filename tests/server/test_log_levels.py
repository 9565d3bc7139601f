"""Log levels by name, of the server and of a worker's agent."""

import logging
from collections.abc import Iterator

import pytest

from gpustack.lib import log_level
from tests.server.conftest import JOIN, Plane, registration

ROUTE = "/debug/log_level"


@pytest.fixture(autouse=True)
def _level_is_put_back() -> Iterator[None]:
    before = logging.getLogger().level
    yield
    logging.getLogger().setLevel(before)


@pytest.mark.parametrize(
    ("body", "level"),
    [("DEBUG", "DEBUG"), ('"WARNING"', "WARNING"), (" error\n", "ERROR"), ("Critical", "CRITICAL")],
)
async def test_an_administrator_reads_and_changes_the_level(
    plane: Plane, body: str, level: str
) -> None:
    admin = await plane.admin()
    answer = await admin.put(ROUTE, content=body)
    assert (answer.status_code, answer.text) == (200, level)
    assert logging.getLogger().level == getattr(logging, level)
    answer = await admin.get(ROUTE)
    assert (answer.text, answer.headers["content-type"]) == (level, "text/plain; charset=utf-8")


@pytest.mark.parametrize("body", [b"", b"LOUD", b"10", b"NOTSET", b'"DEBUG', b"\xff", b'["INFO"]'])
async def test_what_is_no_level_is_refused_and_changes_nothing(plane: Plane, body: bytes) -> None:
    admin, agent = await plane.admin(), await plane.worker()
    before = log_level.current()
    for path in (ROUTE, f"/v2/workers/{agent.id}/log-level"):
        answer = await admin.put(path, content=body)
        assert answer.status_code == 400
        assert "DEBUG, INFO, WARNING, ERROR, CRITICAL" in answer.json()["message"]
    assert (await admin.put(ROUTE, content=b"x" * 65)).status_code == 413
    assert log_level.current() == before


async def test_only_administrators_ask_for_levels(plane: Plane) -> None:
    agent = await plane.worker()
    for path in (ROUTE, f"/v2/workers/{agent.id}/log-level"):
        assert (await agent.http.get(path)).status_code == 403
        assert (await agent.http.put(path, content="DEBUG")).status_code == 403


async def test_a_worker_that_is_not_there_is_a_sentence(plane: Plane) -> None:
    admin, joiner = await plane.admin(), await plane.client(JOIN)
    body = registration("w", port=9)  # nobody listens there
    worker = (await joiner.post("/v2/workers/register", json=body)).json()
    answer = await admin.get(f"/v2/workers/{worker['worker_id']}/log-level")
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert "worker w cannot be reached" in answer.json()["message"]
    assert worker["agent_secret"] not in answer.text
    assert (await admin.get("/v2/workers/99/log-level")).status_code == 404
