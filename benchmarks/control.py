"""The control plane under a full cluster: what a thousand workers cost the server.

    python -m benchmarks.control [--workers 1000] [--instances 10000] [--steady 60]

A real node (without a worker of its own) on SQLite; the workers are simulated over its public port
as agents talk: one open watch each, a heartbeat every 10 s, a status of 4 KB every 30 s. A model of
100 instances is brought to run by them; its rows, as the server wrote them, are then copied until
there are as many instances as asked for, and the node starts anew with those. Prints a Markdown
table. Needs Linux (/proc).
"""

import argparse
import asyncio
import json
import os
import random
import resource
import sqlite3
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from tests.support.node import Node

HEARTBEAT_S, STATUS_S = 10.0, 30.0
REPLICAS = 100  # of one model
STATUS_BYTES = 4096
WATCHERS = 1000
TICKS = os.sysconf("SC_CLK_TCK")

#: What the project promises on two cores: figure -> limit.
LIMITS = {
    "server, % of one core": 20.0,
    "server, resident MB": 300.0,
    "list pages, p99 ms": 150.0,
    "a change reaches 1,000 watchers, ms": 500.0,
}


class Connection:
    """One kept-alive HTTP connection that shows a credential."""

    def __init__(self, port: int, token: str) -> None:
        self._port = port
        self._head = f"Host: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._turn = asyncio.Lock()

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        async with self._turn:
            reader, status, length = await self._send(method, path, body)
            return status, await reader.readexactly(length)

    async def lines(self, path: str) -> AsyncIterator[bytes]:
        """The lines of an endless answer; each chunk holds whole lines."""
        reader, status, _ = await self._send("GET", path, None)
        assert status == 200, status
        while size := int(await reader.readline(), 16):
            chunk = await reader.readexactly(size + 2)
            for line in chunk.splitlines():
                if line:
                    yield line

    async def _send(
        self, method: str, path: str, body: Any
    ) -> tuple[asyncio.StreamReader, int, int]:
        if self._streams is None or self._streams[0].at_eof():
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=2**24)
        reader, writer = self._streams
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\n{self._head}Content-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = 0
        if "content-length:" in answer:
            length = int(answer.partition("content-length:")[2].split("\r\n")[0])
        return reader, int(answer.split(" ")[1]), length


class SimulatedWorker:
    """Talks as an agent does, and runs whatever it is told in no time."""

    def __init__(self, number: int, port: int) -> None:
        self.name = f"worker-{number:04}"
        self._port = port
        run = {"machine_id": f"machine-{number}", "boot_id": "boot", "run_id": f"run-{number}"}
        self._run = run
        self._registration = run | {"name": self.name, "ip": "127.0.0.1", "port": 10150}
        self._devices = [
            {"index": index, "name": "GPU" + "x" * 300, "vendor": "nvidia", "type": "cuda",
             "uuid": f"GPU-{number}-{index}", "memory_total_bytes": 80 * 2**30}
            for index in range(8)
        ]  # fmt: skip

    async def join(self, token: str) -> None:
        door = Connection(self._port, token)
        status, body = await door.ask("POST", "/v2/workers/register", self._registration)
        assert status == 200, body
        said = json.loads(body)
        self.id, self._credential = said["worker_id"], said["credential"]
        self.starts()
        await self._tell()

    def starts(self) -> None:
        """It begins anew, with its credential: it knows of no instance."""
        self._line = Connection(self._port, self._credential)
        self.running: set[int] = set()
        self.is_synced = False

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch())
            group.create_task(self._every(HEARTBEAT_S, self._beat))
            group.create_task(self._every(STATUS_S, self._tell))

    async def _every(self, period_s: float, act: Any) -> None:
        await asyncio.sleep(random.uniform(0, period_s))
        while True:
            await act()
            await asyncio.sleep(period_s)

    async def _beat(self) -> None:
        status, body = await self._line.ask("PUT", f"/v2/workers/{self.id}/heartbeat", self._run)
        assert status == 200, body

    async def _tell(self) -> None:
        for device in self._devices:
            device["memory_used_bytes"] = random.randrange(2**36)
            device["utilization_percent"] = random.random() * 100
        status = {
            "os": "linux", "arch": "x86_64", "cpu_count": 64, "memory_total_bytes": 2**40,
            "cpu_percent": random.random() * 100, "gpu_devices": self._devices,
        }  # fmt: skip
        code, body = await self._line.ask("PUT", f"/v2/workers/{self.id}/status", status)
        assert code == 204, body

    async def _watch(self) -> None:
        watch = Connection(self._port, self._credential)
        async for line in watch.lines("/v2/watch?kinds=model-instances"):
            event = json.loads(line)
            self.is_synced |= event["type"] == "synced"
            if event["type"] == "put" and event["id"] not in self.running:
                self.running.add(event["id"])
                if event["data"]["state"] == "running":
                    continue
                generation = event["data"]["generation"]
                for state in ("starting", "running"):
                    said = {"state": state, "port": 40000, "pid": 1,
                            "observed_generation": generation}  # fmt: skip
                    path = f"/v2/model-instances/{event['id']}/status"
                    code, body = await self._line.ask("PUT", path, said)
                    assert code == 204, (code, body)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) / 1024


async def pages(admin: Connection, seconds: float, instances: int) -> list[float]:
    """Milliseconds of list pages, asked for one after the other with pauses."""
    taken = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        page = random.randint(1, max(instances // 100, 1))
        path = random.choice(
            [f"/v2/model-instances?page={page}&perPage=100", "/v2/models?perPage=100",
             f"/v2/workers?page={random.randint(1, 10)}&perPage=100"]
        )  # fmt: skip
        began = time.perf_counter()
        status, body = await admin.ask("GET", path)
        assert status == 200, body
        taken.append((time.perf_counter() - began) * 1000)
        await asyncio.sleep(0.2)
    return taken


async def fan_out(node: Node, admin: Connection, token: str) -> float:
    """Milliseconds until the last of `WATCHERS` watches of models has heard of one change."""
    heard = asyncio.Semaphore(0)
    synced = asyncio.Semaphore(0)

    async def watcher() -> None:
        connection = Connection(node.port, token)
        async for line in connection.lines("/v2/models?watch=true"):
            if b'"synced"' in line:
                synced.release()
            elif b"changed by the benchmark" in line:
                heard.release()
                return

    async with asyncio.TaskGroup() as group:
        for _ in range(WATCHERS):
            group.create_task(watcher())
        for _ in range(WATCHERS):
            await synced.acquire()
        _, body = await admin.ask("GET", "/v2/models?perPage=1")
        (model,) = json.loads(body)["items"]
        began = time.perf_counter()
        spec = {key: model[key] for key in ("name", "source", "local_path", "replicas")}
        change = spec | {"description": "changed by the benchmark"}
        status, body = await admin.ask("PUT", f"/v2/models/{model['id']}", change)
        assert status == 200, body
        for _ in range(WATCHERS):
            await heard.acquire()
        return (time.perf_counter() - began) * 1000


def secrets(node: Node) -> tuple[str, str]:
    """An administrator's, and the one to join with."""
    files = (node.data_dir / "local_admin", node.data_dir / "token")
    admin, join = (file.read_text().strip() for file in files)
    return admin, join


async def until_all_run(workers: Sequence[SimulatedWorker], instances: int) -> None:
    while sum(len(worker.running) for worker in workers) < instances:  # noqa: ASYNC110
        await asyncio.sleep(0.1)


async def bring(node: Node, workers: Sequence[SimulatedWorker]) -> dict[str, float]:
    """All workers join; the instances of one model come to run on them."""
    token, join = secrets(node)
    admin = Connection(node.port, token)
    began = time.monotonic()
    for worker in workers:
        await worker.join(join)
    joined_s = time.monotonic() - began
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(worker.run()) for worker in workers]
        spec = {"name": "model-0", "source": "local_path", "replicas": REPLICAS,
                "local_path": "/models/m.gguf"}  # fmt: skip
        while not all(worker.is_synced for worker in workers):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        began = time.monotonic()
        status, body = await admin.ask("POST", "/v2/models", spec)
        assert status == 201, body
        await until_all_run(workers, REPLICAS)
        ran_s = time.monotonic() - began
        for task in tasks:
            task.cancel()
    return {
        "workers that join, per s": len(workers) / joined_s,
        "instances placed and running, per s": REPLICAS / ran_s,
    }


def multiply(database: Path, instances: int) -> None:
    """Copy the one model, its version and its instances until there are that many instances."""
    with sqlite3.connect(database) as connection:
        connection.row_factory = sqlite3.Row

        def rows(table: str) -> list[dict[str, Any]]:
            return [dict(row) for row in connection.execute(f"SELECT * FROM {table} ORDER BY id")]  # noqa: S608

        def add(table: str, row: dict[str, Any], **other: Any) -> int:
            row = {key: value for key, value in row.items() if key != "id"} | other
            names = ", ".join(f'"{name}"' for name in row)
            marks = ", ".join("?" * len(row))
            into = f"INSERT INTO {table} ({names}) VALUES ({marks})"  # noqa: S608
            return connection.execute(into, [*row.values()]).lastrowid or 0

        (model,), (version,) = rows("models"), rows("model_versions")
        copied = rows("model_instances")
        workers = [row["id"] for row in rows("workers")]
        for number in range(1, instances // len(copied)):
            model_id = add("models", model, name=f"model-{number}")
            version_id = add("model_versions", version, model_id=model_id)
            for place, row in enumerate(copied, number * len(copied)):
                add(
                    "model_instances", row, name=f"model-{number}-{place}", model_id=model_id,
                    version_id=version_id, worker_id=workers[place % len(workers)],
                )  # fmt: skip
    connection.close()


async def measure(
    node: Node, workers: Sequence[SimulatedWorker], instances: int, seconds: float
) -> dict[str, float]:
    """What the server takes while nothing changes; and with people at work, how long they wait."""
    token, _ = secrets(node)
    admin = Connection(node.port, token)
    (server,) = node.pids("server")
    gateways = node.pids("gateway")
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(worker.run()) for worker in workers]
        await until_all_run(workers, instances)
        await asyncio.sleep(STATUS_S)  # each has spoken once
        before, gates = cpu_s(server), sum(map(cpu_s, gateways))
        await asyncio.sleep(seconds)
        used, passed = cpu_s(server) - before, sum(map(cpu_s, gateways)) - gates
        before = cpu_s(server)
        taken = await pages(admin, seconds, instances)
        read = cpu_s(server) - before
        figures = {
            "server, % of one core": used / seconds * 100,
            "server, resident MB": resident_mb(server),
            "list pages, p99 ms": statistics.quantiles(taken, n=100)[98],
            "a change reaches 1,000 watchers, ms": await fan_out(node, admin, token),
            "list pages, median ms": statistics.median(taken),
            "server while list pages are read, % of one core": read / seconds * 100,
            "gateways, % of one core": passed / seconds * 100,
        }
        for task in tasks:
            task.cancel()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--instances", type=int, default=10_000)
    parser.add_argument("--steady", type=float, default=60.0, help="seconds of each phase")
    given = parser.parse_args()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    with tempfile.TemporaryDirectory() as place:
        node = Node(Path(place) / "node", "--disable-worker").start()
        try:
            workers = [SimulatedWorker(number, node.port) for number in range(given.workers)]
            brought = asyncio.run(bring(node, workers))
            node.stop()
            multiply(node.data_dir / "database.db", given.instances)
            node.start()
            for worker in workers:
                worker.starts()
            figures = asyncio.run(measure(node, workers, given.instances, given.steady)) | brought
        finally:
            node.kill()
    print("| figure | value | limit |\n|---|---|---|")
    for name, value in figures.items():
        print(f"| {name} | {value:.1f} | {LIMITS.get(name, '')} |")


if __name__ == "__main__":
    main()
