"""Editing a model that serves: real engines, and requests without a pause through the gateway."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.node import Node
from tests.support.streams import load, running_streams
from tests.support.wait import eventually

ONE_THREAD = ["--threads=1", "--threads-batch=1"]


@pytest.fixture(scope="module")
def key(node: Node) -> str:
    return node.api_key()


async def until(http: httpx.AsyncClient, path: str, state: str, **limits: Any) -> dict[str, Any]:
    seen: list[dict[str, Any]] = []

    async def reached() -> bool:
        seen[:] = [(await http.get(path)).json()]
        return bool(seen[0]["rollout"]["state"] == state)

    try:
        await eventually(reached, f"the rollout is {state}", within_s=60)
    except AssertionError as error:
        raise AssertionError(f"{error}: {seen}") from None
    return seen[0]


def of_version(node: Node, model_id: int) -> dict[int, int]:
    """Instance -> generation of its version, of those that run."""
    found = node.instances(model_id)
    return {one["id"]: one["model_generation"] for one in found if one["state"] == "running"}


def commands(node: Node) -> list[str]:
    """The command lines of the engines that are there, with = before values."""
    found = []
    for pid in node.engine_pids():
        with suppress(FileNotFoundError):  # it has just ended
            found.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", "="))
    return found


@pytest.fixture
async def http(node: Node) -> Any:
    with node.http() as known:
        headers = dict(known.headers)
    async with httpx.AsyncClient(
        base_url=node.url, headers=headers, timeout=30, trust_env=False
    ) as client:
        yield client


async def test_an_edit_replaces_every_engine_and_no_request_fails(
    node: Node, models: Path, key: str, http: httpx.AsyncClient
) -> None:
    model_id = node.deploy(
        "edited", models / "chat.gguf", replicas=2, backend_parameters=ONE_THREAD
    )
    before = of_version(node, model_id)
    path = f"/v2/models/{model_id}"
    async with load(node, key, "edited") as failures:
        change = {"backend_parameters": [*ONE_THREAD, "--ctx-size=4096"]}
        assert (await http.patch(path, json=change)).json()["generation"] == 2
        await until(http, path, "done")
    assert failures == []
    after = of_version(node, model_id)
    assert set(after.values()) == {2}
    assert not after.keys() & before.keys()
    assert sum("--ctx-size=4096" in command for command in commands(node)) == 2


async def test_a_stream_that_has_begun_ends_whole_on_the_engine_that_is_replaced(
    node: Node, models: Path, key: str, http: httpx.AsyncClient
) -> None:
    model_id = node.deploy("long", models / "slow.gguf", backend_parameters=ONE_THREAD)
    path = f"/v2/models/{model_id}"
    async with running_streams(node, key, "long", max_tokens=200):
        change = {"backend_parameters": [*ONE_THREAD, "--ctx-size=4096"]}
        assert (await http.patch(path, json=change)).status_code == 200
        await until(http, path, "done")
    assert set(of_version(node, model_id).values()) == {2}
    await http.delete(path)


async def test_a_broken_file_stops_the_roll_while_the_old_ones_serve_and_a_rollback_repairs(
    node: Node, models: Path, key: str, http: httpx.AsyncClient
) -> None:
    model_id = node.deploy(
        "broken", models / "chat.gguf", replicas=2, backend_parameters=ONE_THREAD
    )
    before = of_version(node, model_id)
    path = f"/v2/models/{model_id}"
    async with load(node, key, "broken") as failures:
        await http.patch(path, json={"local_path": str(models / "broken.gguf")})
        model = await until(http, path, "paused")
        assert "failed" in model["rollout"]["message"]
        assert model["state_message"] == model["rollout"]["message"]
        assert of_version(node, model_id) == before
        assert model["rollout"]["versions"] == [
            {"generation": 1, "instances": 2, "ready": 2},
            {"generation": 2, "instances": 1, "ready": 0},
        ]
        back = await http.post(f"{path}/rollback", json={})
        assert back.json()["local_path"] == str(models / "chat.gguf")
        await until(http, path, "done")
    assert failures == []
    assert of_version(node, model_id) == before
