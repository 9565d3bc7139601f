"""A cluster on three hosts whose processes are killed, and a look at all that it consists of.

`Cluster` starts launchers again, as a service manager would. `live` says which processes there are
and what each is, from /proc alone.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from gpustack.lib.platform import live_pids, process_environment, start_ticks
from gpustack.worker.supervisor.records import UID_VARIABLE, Record, Records
from tests.support import fake_engine
from tests.support.hosts import Host
from tests.support.node import Node

#: In the environment of every process that a node is or has started.
MARK: Final = "TEST_NODE"
ROLES: Final = ("server", "gateway", "agent", "relay")
#: Seconds after which a launcher that has ended is started again. The product's own unit says 5.
AGAIN_S: Final = 0.3
#: Seconds between two looks whether an instance waits for the end of its back-off.
RETRY_S: Final = 0.5


@dataclass(frozen=True)
class Process:
    """A live process of a node.

    Attributes:
        kind: launcher, a role, engine (its first process), child (of an engine), or other.
        home: the node's data directory.
        uid: of the engine that it belongs to; else "".
    """

    pid: int
    ticks: int
    kind: str
    home: str
    uid: str = ""
    parent: int = 0

    def kill(self) -> bool:
        """kill -9, unless it has ended by itself."""
        if start_ticks(self.pid) != self.ticks:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
            return True
        return False


def live(homes: Iterable[str]) -> list[Process]:
    """The live processes of the nodes that have these data directories."""
    firsts = {home: {record.pid for record in records_of(home)} for home in homes}
    found = []
    for pid in live_pids():
        environment = process_environment(pid)
        home = environment.get(MARK, "")
        if home in firsts and (ticks := start_ticks(pid)):
            with contextlib.suppress(OSError, IndexError):  # it has just ended
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                uid = environment.get(UID_VARIABLE, "")
                kind = _kind(pid) if not uid else "engine" if pid in firsts[home] else "child"
                found.append(Process(pid, ticks, kind, home, uid, parent))
    return found


def records_of(home: str) -> list[Record]:
    """The engines that a node has records of."""
    return list(Records(Path(home)).all())


def _kind(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    if words[1:4] == ["-m", "gpustack", "start"]:
        return "launcher"
    is_role = words[1:3] == ["-m", "gpustack.cli.role"] and words[3] in ROLES
    return words[3] if is_role else "other"


class Cluster:
    """Nodes on hosts of their own, with the fake engine; launchers that end are started again.

    Args:
        folder: an empty one for all that the nodes have.
        ports: for engines, on each host.
        database_url: of the first two, which are servers then.

    Attributes:
        nodes: named after their hosts, `host1` and so on; the first is a server.
    """

    def __init__(
        self, folder: Path, places: Sequence[Host], *, ports: int, database_url: str = ""
    ) -> None:
        self.nodes: list[Node] = []
        self._folder, self._places, self._ports = folder, places, ports
        # Not patient: launchers have to be looked after meanwhile.
        self._http = httpx.Client(timeout=2, trust_env=False)
        self._database = ["--database-url", database_url] if database_url else []
        self._ended: dict[Node, float] = {}
        self._retried = 0.0

    @property
    def server(self) -> Node:
        return self.nodes[0]

    def start(self) -> None:
        for number, host in enumerate(self._places, 1):
            name = f"host{number}"
            is_server = number <= (2 if self._database else 1)
            node = Node(
                self._folder / name,
                *("--advertise-address", host.address, "--worker-name", name),
                *("--worker-labels", f"place={name}"),
                *(self._database if is_server else []),
                server=None if is_server else self.nodes[0],
                host=host,
                engine_ports=self._ports,
            )
            fake_engine.install(node.data_dir / "bin")
            node.environment[MARK] = str(node.data_dir)
            self.nodes.append(node)
            node.start()
        credential = (self.server.data_dir / "local_admin").read_text().strip()
        self._http.base_url = httpx.URL(self.server.url)
        self._http.headers["Authorization"] = f"Bearer {credential}"

    def processes(self) -> list[Process]:
        return live(str(node.data_dir) for node in self.nodes)

    def keep(self) -> None:
        """What goes on beside the test; to be called all the time."""
        now = time.monotonic()
        for node in self.nodes:
            assert node.process is not None
            if node.process.poll() is None:
                self._ended.pop(node, None)
            elif now - self._ended.setdefault(node, now) >= AGAIN_S:
                node.start(wait=False)
        if now - self._retried >= RETRY_S:
            self._retried = now
            self._be_impatient()

    def wait(self, seconds: float) -> None:
        self.until(lambda: False, seconds)

    def until(self, check: Callable[[], bool], seconds: float, *, every_s: float = 0.02) -> bool:
        """Whether `check` held within so many seconds."""
        deadline = time.monotonic() + seconds
        while True:
            self.keep()
            if check():
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(every_s)

    def get(self, path: str) -> list[Any]:
        """All items of a list; fails with httpx.HTTPError while the server is away."""
        answer = self._http.get(path)
        answer.raise_for_status()
        body = answer.json()
        assert body["pagination"]["totalPage"] <= 1
        return list(body["items"])

    def post(self, path: str, body: Any = None) -> Any:
        answer = self._http.post(path, json=body)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def chat(self, model: str, prompt: str) -> int:
        """The pid of the engine that answered, rightly."""
        said = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 3}
        body = self.post("/v1/chat/completions", said)
        text = body["choices"][0]["message"]["content"]
        assert text == fake_engine.words(prompt, 3), body
        return int(body["system_fingerprint"])

    def deploy(
        self,
        name: str,
        replicas: int = 1,
        fake: str = "",
        selector: Mapping[str, str] | None = None,
    ) -> None:
        """Want a model of the fake engine, spread over the hosts that `selector` leaves."""
        spec = fake_engine.spec(self.server.data_dir, fake, worker_selector=selector or {})
        body = {"name": name, "replicas": replicas, "placement_strategy": "spread"}
        self.post("/v2/models", body | spec.model_dump(mode="json", exclude_unset=True))

    def end(self) -> None:
        """Kill whatever is there, until nothing is left."""
        deadline = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < deadline:
            for process in left:
                process.kill()
            time.sleep(0.02)
        for node in self.nodes:
            if node.process is not None:
                node.process.wait(10)
        self._http.close()

    def _be_impatient(self) -> None:
        """Start what waits for the end of its back-off: as a person would, who cannot wait."""
        with contextlib.suppress(httpx.HTTPError):
            for one in self.get("/v2/model-instances"):
                if one["state"] == "error" and not one["deleting"]:
                    self.post(f"/v2/model-instances/{one['id']}/retry")
