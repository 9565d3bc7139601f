"""The figures of one node: how fast it starts, deploys and stops, and how much memory it takes.

    python -m benchmarks.figures [--rounds 5] [--settle 60]

Prints a Markdown table of medians, minima and maxima. Needs Linux (/proc).
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import httpx

from demo import tiny_gguf
from tests.support.node import Node

Figures = dict[str, list[float]]

#: What the project promises on two cores: figure -> limit.
LIMITS = {
    "first start to ready, s": 3.0,
    "later start to ready, s": 1.5,
    "gpustack version, s": 0.2,
    "gpustack start --help, s": 0.5,
    "deploy to running, s": 2.0,
    "PSS of all processes, MB": 200.0,
    "SIGTERM to exit when idle, s": 3.0,
}


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def command(*words: str) -> float:
    """Seconds that a command takes as a user runs it."""
    program = Path(sys.executable).with_name("gpustack")
    return timed(lambda: subprocess.run([program, *words], check=True, capture_output=True))


def until_ready(node: Node) -> float:
    """From exec until /readyz is 200 on the public port and the worker is `ready`.

    A worker that was ready in an earlier life does not count until it has announced itself.
    """
    began = datetime.now(UTC)

    def start() -> None:
        node.start(wait=False)
        credential = node.data_dir / "local_admin"
        with httpx.Client(base_url=node.url, trust_env=False, timeout=5) as http:
            while not _is_ready(http, credential, began):
                time.sleep(0.01)

    return timed(start)


def _is_ready(http: httpx.Client, credential: Path, began: datetime) -> bool:
    try:
        if http.get("/readyz").status_code != httpx.codes.OK:
            return False
        headers = {"Authorization": f"Bearer {credential.read_text().strip()}"}
        found = http.get("/v2/workers", headers=headers)
        return found.is_success and any(
            worker["state"] == "ready" and datetime.fromisoformat(worker["updated_at"]) > began
            for worker in found.json()["items"]
        )
    except (httpx.HTTPError, OSError):
        return False


def pss_mb(pids: list[int]) -> float:
    """Proportional set size of the processes together: shared pages are counted once."""
    total_kb = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total_kb += int(line.split()[1])
    return total_kb / 1024


def one_round(folder: Path, model: Path, settle_s: float, figures: Figures) -> None:
    node = Node(folder)
    try:
        figures["first start to ready, s"].append(until_ready(node))
        figures["SIGTERM to exit when idle, s"].append(timed(node.stop))
        figures["later start to ready, s"].append(until_ready(node))
        time.sleep(settle_s)
        figures["PSS of all processes, MB"].append(pss_mb(node.pids()))
        figures["deploy to running, s"].append(timed(lambda: node.deploy("tiny", model)))
    finally:
        node.kill()
    figures["gpustack version, s"].append(command("version"))
    figures["gpustack start --help, s"].append(command("start", "--help"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--settle", type=float, default=60.0, help="seconds before memory is read")
    given = parser.parse_args()
    figures: Figures = {name: [] for name in LIMITS}
    with tempfile.TemporaryDirectory() as place:
        model = tiny_gguf.write(Path(place) / "tiny.gguf", "chat")
        for number in range(given.rounds):
            one_round(Path(place) / f"node{number}", model, given.settle, figures)
    print("| figure | median | min | max | limit |")
    print("|---|---|---|---|---|")
    for name, values in figures.items():
        row = (statistics.median(values), min(values), max(values), LIMITS[name])
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row) + " |")


if __name__ == "__main__":
    main()
