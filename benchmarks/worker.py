"""One worker with many engines: what its agent and its relay cost when nothing happens.

    python -m benchmarks.worker [--instances 64] [--idle 60]

A real server node and a real worker node that joined it, with the fake engine of the tests (real
processes that answer health, metrics and chats). The instances are brought to run, left alone, all
rolled to another version, and removed. Time is that of the processes, so that whatever else the
machine does matters little. Prints a Markdown table. Needs Linux (/proc).
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.figures import pss_mb
from tests.support import fake_engine
from tests.support.node import Node
from tests.support.wait import soon

TICKS = os.sysconf("SC_CLK_TCK")
LABEL = "bench"
#: What the project promises on two cores: figure -> limit.
LIMITS = {
    "agent, idle, % of one core": 5.0,
    "agent, resident MB": 80.0,
}


def cpu_s(pid: int) -> float:
    """Seconds of processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"process {pid} does not say how much memory it has")


class Bench:
    """A server and a worker on this machine."""

    def __init__(self, folder: Path, instances: int) -> None:
        self.instances = instances
        self.server = Node(folder / "server", "--disable-worker")
        self.figures: dict[str, float] = {}
        self._folder = folder
        self._started: list[Node] = []

    def start(self) -> None:
        self._started.append(self.server.start())
        label = ("--worker-labels", f"place={LABEL}")
        self.worker = Node(
            self._folder / "worker",
            *label,
            server=self.server,
            engine_ports=2 * self.instances,
        )
        fake_engine.install(self.worker.data_dir / "bin")
        self._started.append(self.worker.start())

    def end(self) -> None:
        for node in reversed(self._started):
            node.kill()

    def deploy(self) -> int:
        spec = fake_engine.spec(self.server.data_dir, worker_selector={"place": LABEL})
        body = {"name": "many", "replicas": self.instances, "placement_strategy": "spread"}
        with self.server.http() as http:
            said = body | spec.model_dump(mode="json", exclude_unset=True)
            answer = http.post("/v2/models", json=said)
            answer.raise_for_status()
            return int(answer.json()["id"])

    def until_running(self, model_id: int, generation: int) -> None:
        """Return once exactly the instances of that generation are there, and run."""

        def all_run() -> bool:
            found = self.server.instances(model_id)
            states = [(one["model_generation"], one["state"]) for one in found]
            time.sleep(0.2)
            return states == [(generation, "running")] * self.instances

        soon(all_run, "every instance runs", within_s=600)

    def roll(self, model_id: int) -> None:
        with self.server.http() as http:
            change = {"env": {"FAKE": "say=again"}}
            http.patch(f"/v2/models/{model_id}", json=change).raise_for_status()
        self.until_running(model_id, 2)

    def idle(self, seconds: float, role: str) -> Callable[[], None]:
        pid = self.worker.pids(role)[0]
        before, began = cpu_s(pid), time.monotonic()

        def ended() -> None:
            used = cpu_s(pid) - before
            name = f"{role}, idle, % of one core"
            self.figures[name] = 100 * used / (time.monotonic() - began)
            self.figures[f"{role}, resident MB"] = resident_mb(pid)
            self.figures[f"{role}, PSS MB"] = pss_mb([pid])

        return ended

    def run(self, idle_s: float) -> None:
        self.start()
        began = time.monotonic()
        model_id = self.deploy()
        self.until_running(model_id, 1)
        self.figures["instances placed and running, per s"] = self.instances / (
            time.monotonic() - began
        )
        time.sleep(10)  # what came with the start is over
        measures = [self.idle(idle_s, role) for role in ("agent", "relay")]
        time.sleep(idle_s)
        for ended in measures:
            ended()
        began = time.monotonic()
        self.roll(model_id)
        self.figures["all rolled, new before old, s"] = time.monotonic() - began
        pid = self.worker.pids("agent")[0]
        self.figures["agent after the roll, resident MB"] = resident_mb(pid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=64)
    parser.add_argument("--idle", type=float, default=60.0, help="seconds to look at it")
    given: Any = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place), given.instances)
        try:
            bench.run(given.idle)
        finally:
            bench.end()
    print("| figure | value | limit | |")
    print("|---|---|---|---|")
    for name, value in sorted(bench.figures.items(), key=lambda each: each[0] not in LIMITS):
        limit = LIMITS.get(name)
        met = "" if limit is None else "met" if value <= limit else "MISSED"
        print(f"| {name} | {value:.1f} | {'' if limit is None else f'{limit:g}'} | {met} |")


if __name__ == "__main__":
    main()
