"""kill -9 of whatever a cluster of three hosts consists of: it comes to rest, whole.

`GPUSTACK_TEST_SEED` and `GPUSTACK_TEST_KILLS` make a run of their own.
"""

import asyncio
import contextlib
import logging
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import httpx
import pytest

from tests.support.cluster import Cluster, Process
from tests.support.databases import KINDS as KINDS_OF_DATABASES
from tests.support.hosts import hosts, lacking
from tests.support.inspection import descriptors, doubled, grown, problems
from tests.support.node import Node

logger = logging.getLogger(__name__)

KILLS = [
    pytest.param("sqlite", 25, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    pytest.param("sqlite", 500, marks=[pytest.mark.soak, pytest.mark.timeout(7200)]),
    # Two of the three are servers.
    pytest.param("embedded", 100, marks=[pytest.mark.soak, pytest.mark.timeout(7200)]),
]
KINDS: Final = ("agent", "relay", "engine", "child", "launcher", "gateway", "server")
#: Model -> instances, what the fake engine is told, and where they have to be.
MODELS: Final[dict[str, tuple[int, str, dict[str, str]]]] = {
    "plain": (3, "pace=0.3", {}),
    "with-child": (3, "child pace=0.3", {}),
    "apart": (2, "child-apart pace=0.3", {}),
    "slow-start": (2, "delay=0.5", {}),
    "stubborn": (1, "stubborn pace=0.3", {}),
    "there": (2, "child pace=0.3", {"place": "host3"}),
}
#: Ports for engines on each host.
PORTS: Final = 10
REST_S: Final = 120.0


@pytest.fixture
def cluster(
    request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Three hosts with every model wanted, on a database of the kind that is the parameter."""
    if why := lacking():
        pytest.skip(why)
    with ExitStack() as stack:
        url = ""
        if request.param != "sqlite":
            kind = KINDS_OF_DATABASES[request.param]
            databases = stack.enter_context(kind(tmp_path_factory.mktemp("db")))
            url = asyncio.run(databases.empty(tmp_path))
        places = stack.enter_context(hosts(3))
        made = Cluster(tmp_path, places, ports=PORTS, database_url=url)
        try:
            made.start()
            for name, (replicas, fake, selector) in MODELS.items():
                made.deploy(name, replicas, fake, selector)
            yield made
        finally:
            made.end()


class Killer:
    """Chooses whom to kill, and does it.

    Attributes:
        killed: how many of each kind.
        said: every step, for who reads of a failure.
    """

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self._cluster = cluster
        self._rng = random.Random(seed)
        self._began = time.monotonic()
        self.killed = Counter[str]()
        self.said: list[str] = []

    def step(self, wanted: dict[str, int]) -> None:
        """One or two kills, at once or one right after the other, and a pause."""
        rng = self._rng
        if rng.random() < 0.03:
            self._lose(rng.choice(self._cluster.nodes))
        kind = rng.choice(KINDS)
        victim = self._kill(kind)
        if victim is not None and kind in ("engine", "child") and rng.random() < 0.3:
            self._kill_as_it_spawns(victim)
        elif rng.random() < 0.2:
            home = victim.home if victim is not None and rng.random() < 0.5 else ""
            self._kill(rng.choice(KINDS), home)
        elif victim is not None and rng.random() < 0.2:
            pause_s = rng.uniform(0, 0.7)
            if self._cluster.until(lambda: self._another(victim) is not None, 5):
                self._cluster.wait(pause_s)
                self._kill(kind, home=victim.home)
        if rng.random() < 0.05:
            self._restart(rng.choice(self._cluster.nodes))
        if rng.random() < 0.08:
            self._say("waits for rest")
            rest(self._cluster, wanted)
        else:
            self._cluster.wait(rng.uniform(0, 1.5))
        assert doubled(self._cluster) == []

    def _kill_as_it_spawns(self, victim: Process) -> None:
        """The agent, while it writes of, or spawns, the engine that takes the place of another."""
        folder, pause_s = Path(victim.home) / "engines", self._rng.uniform(0, 0.03)
        before = {path.name for path in folder.glob("*")}

        def begins() -> bool:
            return any(path.name not in before for path in folder.glob("*"))

        agents = self._of("agent", victim.home)  # before: to look takes longer than to spawn
        if self._cluster.until(begins, 5, every_s=0.001):
            time.sleep(pause_s)  # any of these moments must do
            for agent in agents:
                self._end(agent, "as it spawns")

    def _another(self, victim: Process) -> Process | None:
        """One of the same kind on the same node that started later."""
        found = self._of(victim.kind, victim.home)
        return next((one for one in found if one.ticks > victim.ticks), None)

    def _of(self, kind: str, home: str = "") -> list[Process]:
        found = [one for one in self._cluster.processes() if one.kind == kind]
        return sorted(
            (one for one in found if home in ("", one.home)), key=lambda one: (one.home, one.ticks)
        )

    def _kill(self, kind: str, home: str = "") -> Process | None:
        there = self._of(kind, home)
        chosen = self._rng.random()  # also where nobody is there: the same seed, the same steps
        if not there:
            self._say(f"no {kind} to kill")
            return None
        victim = there[int(chosen * len(there))]
        self._end(victim)
        return victim

    def _end(self, victim: Process, when: str = "") -> None:
        if victim.kill():
            self.killed[victim.kind] += 1
            self._say(f"kills {victim.kind} {victim.pid} of {Path(victim.home).name} {when}")

    def _lose(self, node: Node) -> None:
        """Kill all of a host, as the end of its power would."""
        self._say(f"kills all of {node.data_dir.name}")
        for process in self._cluster.processes():
            if process.home == str(node.data_dir) and process.kill():
                self.killed[process.kind] += 1

    def _restart(self, node: Node) -> None:
        """`gpustack restart` is this signal and a look whether it was obeyed."""
        assert node.process is not None
        if node.said().get("pid") == node.process.pid and node.process.poll() is None:
            self._say(f"restarts {node.data_dir.name}")
            node.process.send_signal(signal.SIGUSR2)

    def _say(self, sentence: str) -> None:
        self.said.append(f"{time.monotonic() - self._began:7.2f} {sentence}")


@pytest.mark.parametrize(("cluster", "kills"), KILLS, indirect=["cluster"])
def test_a_cluster_whose_processes_are_killed_comes_to_rest_whole(
    cluster: Cluster, kills: int
) -> None:
    seed = int(os.environ.get("GPUSTACK_TEST_SEED", "") or random.randrange(10**6))
    kills = int(os.environ.get("GPUSTACK_TEST_KILLS", "") or kills)
    logger.warning("GPUSTACK_TEST_SEED=%d", seed)
    wanted = {name: replicas for name, (replicas, *_) in MODELS.items()}
    killer = Killer(cluster, seed)
    try:
        rest(cluster, wanted)
        before = descriptors(cluster)
        with traffic(cluster):
            while killer.killed.total() < kills:
                killer.step(wanted)
        began = time.monotonic()
        rest(cluster, wanted)
        logger.warning("%s; at rest after %.1f s", killer.killed, time.monotonic() - began)
        assert grown(before, descriptors(cluster)) == []
        serves(cluster)
        fills(cluster, wanted)
    except (AssertionError, httpx.HTTPError) as error:
        steps = "\n".join(killer.said[-60:])
        raise AssertionError(f"seed {seed}: {error}\n{steps}\n{logs(cluster)}") from error


def rest(cluster: Cluster, wanted: dict[str, int]) -> None:
    """Return once nothing is wrong."""
    found: list[str] = []

    def is_well() -> bool:
        found[:] = problems(cluster, wanted)
        return not found

    assert cluster.until(is_well, REST_S), "\n".join(found)


@contextlib.contextmanager
def traffic(cluster: Cluster) -> Iterator[None]:
    """Streams without a pause, so that what is told to leave has something to finish."""
    over = threading.Event()

    def ask(model: str) -> None:
        body = {"model": model, "messages": [], "max_tokens": 12, "stream": True}
        with cluster.server.http() as http:
            while not over.wait(0.1):
                with (
                    contextlib.suppress(httpx.HTTPError),
                    http.stream("POST", "/v1/chat/completions", json=body) as answer,
                ):
                    for _ in answer.iter_raw():
                        if over.is_set():
                            break

    with ThreadPoolExecutor(len(MODELS)) as threads:
        asked = [threads.submit(ask, model) for model in MODELS]
        try:
            yield
        finally:
            over.set()
            for each in asked:
                each.result()


def serves(cluster: Cluster) -> None:
    """Every engine answers through the gateway."""
    for name in MODELS:
        pids = {
            one["pid"] for one in cluster.get("/v2/model-instances") if one["model_name"] == name
        }
        answered: set[int] = set()

        def all_have(
            name: str = name, pids: set[int] = pids, answered: set[int] = answered
        ) -> bool:
            answered.add(cluster.chat(name, "who is there"))
            return answered >= pids

        assert cluster.until(all_have, 20), f"{name}: {answered} answered, running are {pids}"


def fills(cluster: Cluster, wanted: dict[str, int]) -> None:
    """As many engines as there are ports can run: no port is leased to nobody."""
    instances = Counter(
        one["worker_name"] for one in cluster.get("/v2/model-instances") if one["worker_name"]
    )
    more = {name: PORTS - count for name, count in instances.items()}
    for name, count in more.items():
        cluster.deploy(f"fill-{name}", count, selector={"place": name})
    rest(cluster, wanted | {f"fill-{name}": count for name, count in more.items()})


def logs(cluster: Cluster) -> str:
    """What the nodes have complained of lately."""
    said = []
    for node in cluster.nodes:
        lines = node.log.read_text(errors="replace").splitlines()
        said += [f"--- {node.data_dir.name}", *lines[-60:]]
    return "\n".join(said)
