"""Machines whose cables are taken out: what becomes of their engines, and of what replaces them.

The machine that is cut off has a clock of its own, where libfaketime is at hand.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import MakeNode
from tests.support.hosts import Host, hosts, lacking
from tests.support.impatient_server import ImpatientServer
from tests.support.node import Node
from tests.support.wait import soon

pytestmark = pytest.mark.slow

#: Agents say something every 10 s, on a busy machine a bit later.
SILENT_AFTER_S, GRACE_S = 13.0, 20.0
AHEAD_H = 5


@pytest.fixture(scope="module")
def places() -> Iterator[list[Host]]:
    if why := lacking():
        pytest.skip(why)
    with hosts(3) as made:
        yield made


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, places: list[Host]
) -> Iterator[ImpatientServer]:
    made = ImpatientServer(
        tmp_path_factory.mktemp("impatient"),
        places[0],
        silent_after_s=SILENT_AFTER_S,
        grace_s=GRACE_S,
    )
    made.start()
    yield made
    made.kill()


def another_clock() -> dict[str, str]:
    """Variables that put a program some hours ahead; none where this machine has no libfaketime."""
    installed = [str(one) for one in Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")]
    found = os.environ.get("LIBFAKETIME", next(iter(installed), ""))
    if not found:
        return {}
    ahead = {
        "LD_PRELOAD": found,
        "FAKETIME": f"+{AHEAD_H}h",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    script = "import time; print(time.time())"
    seen = [
        float(subprocess.run([sys.executable, "-c", script], env=env, capture_output=True).stdout)
        for env in ({}, ahead)
    ]
    assert seen[1] - seen[0] > (AHEAD_H - 1) * 3600
    return ahead


def join(make_node: MakeNode, server: Any, host: Host, *options: str, **variables: str) -> Node:
    node = make_node(*options, name=host.name, server=server, host=host)
    node.environment = variables
    node.start()

    def ready() -> bool:
        with server.http() as http:
            known = http.get("/v2/workers").json()["items"]
        return (node.data_dir.name, "ready") in [(one["name"], one["state"]) for one in known]

    soon(ready, f"{host.name} has joined", within_s=60)
    return node


def deploy(server: ImpatientServer, name: str, path: Path, **spec: Any) -> tuple[str, int, int]:
    """Its path, its instance, and the process of that."""
    body = {"name": name, "source": "local_path", "local_path": str(path)} | spec
    with server.http() as http:
        answer = http.post("/v2/models", json=body)
        assert answer.status_code == 201, answer.text
    (one,) = until(server, name, lambda all: [o["state"] for o in all] == ["running"])
    return f"/v2/models/{answer.json()['id']}", one["id"], one["pid"]


def until(server: ImpatientServer, model: str, check: Any) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []

    def holds() -> bool:
        seen[:] = server.instances(model)
        return bool(check(seen))

    try:
        soon(holds, f"what is asked of {model}", within_s=90)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{seen}\n{server.log.read_text()[-3000:]}") from None
    return seen


def states(instances: list[dict[str, Any]]) -> dict[int, str]:
    return {one["id"]: one["state"] for one in instances}


def test_engines_of_a_machine_that_is_cut_off_run_on_and_none_is_doubled(
    make_node: MakeNode, server: ImpatientServer, places: list[Host], models: Path
) -> None:
    file = models / "chat.gguf"
    cut_off = join(make_node, server, places[1], "--worker-labels", "here=yes", **another_clock())
    moves, moves_id, moves_pid = deploy(server, "moves", file)
    _, stays_id, stays_pid = deploy(server, "stays", file, worker_selector={"here": "yes"})
    goes, _, goes_pid = deploy(server, "goes", file)
    engines = {moves_pid, stays_pid, goes_pid}
    assert engines <= set(cut_off.engine_pids())
    other = join(make_node, server, places[2])

    # Silent for less than the grace period: nothing happens.
    places[1].cut()
    (one,) = until(server, "moves", lambda all: states(all) == {moves_id: "unreachable"})
    assert "another instance takes this one's place at" in one["state_message"]
    places[1].heal()
    until(server, "moves", lambda all: states(all) == {moves_id: "running"})
    assert len(server.instances("stays")) == 1
    assert engines <= set(cut_off.engine_pids())

    # For longer; the server is killed meanwhile, and counts anew.
    places[1].cut()
    server.kill()
    server.start()
    with server.http() as http:
        assert http.delete(goes).status_code < 300
    found = until(server, "moves", lambda all: "running" in states(all).values() and len(all) == 2)
    new = next(one for one in found if one["id"] != moves_id)
    assert new["pid"] in other.engine_pids()
    assert states(found)[moves_id] == "unreachable"
    until(server, "goes", lambda all: not all)
    assert set(states(until(server, "stays", lambda all: len(all) == 2)).values()) == {
        "unreachable",
        "pending",
    }
    assert engines <= set(cut_off.engine_pids())

    # Back: what runs elsewhere by now ends here, what does not stays, what is gone ends.
    places[1].heal()
    until(server, "moves", lambda all: states(all) == {new["id"]: "running"})
    until(server, "stays", lambda all: states(all) == {stays_id: "running"})
    soon(lambda: cut_off.engine_pids() == [stays_pid], "one engine is left there", within_s=60)
    assert new["pid"] in other.engine_pids()
    with server.http() as http:
        model = http.get(moves).json()
    assert (model["ready_replicas"], model["rollout"]["state"]) == (1, "done")
