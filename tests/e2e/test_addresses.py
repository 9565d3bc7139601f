"""Workers whose addresses change, and hosts that have IPv6 alone."""

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import MakeNode
from tests.support.certificate import Issued, issue
from tests.support.hosts import NETWORK, Host, hosts, lacking
from tests.support.node import Node
from tests.support.streams import Stream, client, running_streams
from tests.support.wait import eventually, soon

pytestmark = pytest.mark.slow

REMOTE = "remote"


@pytest.fixture(params=["v4", "v6"])
def places(request: pytest.FixtureRequest) -> Iterator[list[Host]]:
    if why := lacking():
        pytest.skip(why)
    with hosts(2, v6=request.param == "v6") as made:
        yield made


@pytest.fixture
def issued(tmp_path: Path) -> Issued:
    return issue(tmp_path)


def worker_of(server: Node) -> Any:
    with server.http() as http:
        return (http.get("/v2/workers").json()["items"] or [{}])[0]


def keep_secondaries(host: Host) -> None:
    """Else a network's later addresses would go with its first."""
    words = "echo 1 > /proc/sys/net/ipv4/conf/eth0/promote_secondaries"
    subprocess.run([*host.command, "sh", "-c", words], check=True)


def cluster(make_node: MakeNode, places: list[Host], *options: str) -> tuple[Node, Node]:
    """A server, and a worker that joined with the command that the server printed."""
    server = make_node(
        "--disable-worker", "--host", "::", "--advertise-address", places[0].address, *options,
        name="server", host=places[0],
    ).start()  # fmt: skip
    said = subprocess.run(
        [*places[0].command, sys.executable, "-m", "gpustack", "token", "create",
         "--data-dir", str(server.data_dir)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    join = shlex.split(said.stdout)[2:]
    if ":" in places[0].address:
        assert join[1] == f"https://[{places[0].address}]:{server.tls_port}"
    worker = make_node(*join, name="worker", server=server, host=places[1]).start()
    soon(lambda: worker_of(server).get("state") == "ready", "the worker is ready", within_s=60)
    return server, worker


@pytest.mark.parametrize("places", ["v6"], indirect=True)
async def test_a_cluster_needs_no_ipv4(
    make_node: MakeNode, places: list[Host], issued: Issued, models: Path
) -> None:
    server, worker = cluster(make_node, places, *issued.options)
    assert worker_of(server)["ip"] == places[1].address
    server.deploy(REMOTE, models / "chat.gguf")
    async with client(server, server.api_key()) as api:
        assert (await Stream().run(api, REMOTE, "by IPv6", max_tokens=3)).whole
    with server.http() as http:
        (instance,) = http.get("/v2/model-instances").json()["items"]
        assert len(http.get(f"/v2/model-instances/{instance['id']}/logs").content) > 100
        (engine,) = http.get("/v2/workers/1/engines").json()
        assert engine["instance_name"] == instance["name"]
    assert worker.stop() == 0


@pytest.mark.parametrize("places", ["v4"], indirect=True)
async def test_a_changed_address_is_used_without_a_restart(
    make_node: MakeNode, places: list[Host], models: Path
) -> None:
    """First with both for a while, then from one moment to the other."""
    server, worker = cluster(make_node, places)
    slow = ["--threads=1", "--threads-batch=1"]
    server.deploy(REMOTE, models / "slow.gguf", backend_parameters=slow)
    key, pids = server.api_key(), {*worker.pids(), *worker.engine_pids()}
    first, second, third = (f"{NETWORK}.{number}" for number in (2, 77, 78))
    mine = places[1]

    async def is_at(address: str) -> bool:
        return bool(worker_of(server)["ip"] == address)

    async def answers() -> bool:
        async with client(server, key) as api:
            return (await Stream().run(api, REMOTE, "again", max_tokens=2)).whole

    def talked_to() -> set[str]:
        """Addresses of the worker that connections of gateways are open to."""
        found = subprocess.run(
            [*places[0].command, "ss", "-Htn", "dst", f":{worker.worker_port}"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        peers = (line.split()[4].rpartition(":")[0] for line in found.splitlines())
        return {peer.strip("[]").removeprefix("::ffff:") for peer in peers}

    assert await is_at(first)
    async with running_streams(server, key, REMOTE):
        mine.ip("addr", "add", f"{second}/24", "dev", "eth0")
        mine.ip("route", "change", f"{NETWORK}.0/24", "dev", "eth0", "src", second)
        await eventually(lambda: is_at(second), "the new address is known", within_s=60)
        assert await answers()
        assert talked_to() == {first, second}  # the stream goes on as it was
    keep_secondaries(mine)
    mine.ip("addr", "del", f"{first}/24", "dev", "eth0")
    assert await answers()

    mine.ip("addr", "add", f"{third}/24", "dev", "eth0")
    mine.ip("addr", "del", f"{second}/24", "dev", "eth0")
    await eventually(lambda: is_at(third), "the third address is known", within_s=90)
    assert await answers()
    assert worker_of(server)["state"] == "ready"
    assert {*worker.pids(), *worker.engine_pids()} == pids
