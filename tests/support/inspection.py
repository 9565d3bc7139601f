"""What is wrong with a cluster that should be at rest, a sentence each; none when all is well.

The server's lists, the records on disk, /proc and the kernel's tables of ports are read one after
the other: while the cluster still moves they disagree.
"""

import json
import os
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final

import httpx

from tests.support.cluster import Cluster, Process, records_of
from tests.support.node import Node

LISTENING: Final = "0A"  # TCP_LISTEN of the kernel's include/net/tcp_states.h
#: Descriptors that come and go: connections kept alive, a file that is being read.
SLACK: Final = 12


def problems(cluster: Cluster, wanted: Mapping[str, int]) -> list[str]:
    """All that is wrong now.

    Args:
        wanted: model -> how many instances.
    """
    try:
        workers = cluster.get("/v2/workers")
        instances = cluster.get("/v2/model-instances")
    except httpx.HTTPError as error:
        return [f"the server does not answer: {error!r}"]
    found = [
        f"worker {one['name']} is {one['state']}" for one in workers if one["state"] != "ready"
    ]
    found += _of_models(instances, wanted)
    names = {one["id"]: one["name"] for one in workers}
    processes = cluster.processes()
    for node in cluster.nodes:
        theirs = [one for one in processes if one.home == str(node.data_dir)]
        here = [one for one in instances if names.get(one["worker_id"]) == node.data_dir.name]
        for sentence in (*_of_roles(node, theirs), *_of_engines(node, theirs, here)):
            found.append(f"{node.data_dir.name}: {sentence}")
        found += [f"{node.data_dir.name}: {one}" for one in (*_of_disk(node, here), *_ports(node))]
    return [*found, *_of_database(cluster.server, instances)]


def _of_models(instances: list[Any], wanted: Mapping[str, int]) -> Iterator[str]:
    counts = Counter(one["model_name"] for one in instances)
    if counts != Counter(wanted):
        yield f"wanted are {dict(wanted)}, there are {dict(counts)}"
    for one in instances:
        if one["state"] != "running" or one["deleting"]:
            yield f"{one['name']} is {one['state']}: {one['state_message']}"


def _of_roles(node: Node, processes: list[Process]) -> Iterator[str]:
    assert node.process is not None
    is_server = "--server-url" not in node.arguments
    expected = Counter({"launcher": 1, "agent": 1, "relay": 1})
    if is_server:
        expected += Counter({"server": 1, "gateway": 2})
    ours = [one for one in processes if not one.uid]
    counts = Counter(one.kind for one in ours)
    if counts != expected:
        yield f"its processes are {dict(counts)}"
    for one in ours:
        parent = os.getpid() if one.kind == "launcher" else node.process.pid
        if one.parent != parent:
            yield f"{one.kind} {one.pid} is a child of {one.parent}, not of {parent}"
        for zombie in _zombies(one.pid):
            yield f"{one.kind} {one.pid} has not reaped its child {zombie}"
    if not node.said().get("ready"):
        yield "its launcher does not say that it is ready"


def _of_engines(node: Node, processes: list[Process], instances: list[Any]) -> Iterator[str]:
    """The records, the processes and the server's list name the same engines."""
    known = {record.uid: record for record in records_of(str(node.data_dir))}
    wanted = Counter(one["id"] for one in instances)
    of_records = Counter(record.instance_id for record in known.values())
    if of_records != wanted:
        yield f"instances {sorted(wanted)} are placed here, records are of {sorted(of_records)}"
    by_uid: dict[str, list[Process]] = defaultdict(list)
    for one in processes:
        if one.uid:
            by_uid[one.uid].append(one)
    for uid in by_uid.keys() - known.keys():
        yield f"no record is of the engine of {[one.pid for one in by_uid[uid]]}"
    shown = {one["id"]: one for one in instances}
    for uid, record in known.items():
        firsts = [one.pid for one in by_uid[uid] if one.kind == "engine"]
        if firsts != [record.pid] or not record.is_alive:
            yield f"the record of {record.instance_name} says {record.pid}, alive are {firsts}"
        one = shown.get(record.instance_id, {})
        if (one.get("pid"), one.get("port")) != (record.pid, record.port):
            yield f"{record.instance_name}: the server knows pid {one.get('pid')}, not {record.pid}"


def doubled(cluster: Cluster) -> list[str]:
    """Instances that more than one engine runs for; there is none at any moment."""
    records = [one for node in cluster.nodes for one in records_of(str(node.data_dir))]
    alive = Counter(record.instance_name for record in records if record.is_alive)
    return [f"{count} engines run for {name}" for name, count in alive.items() if count > 1]


def _of_disk(node: Node, instances: list[Any]) -> Iterator[str]:
    desired = json.loads(_text(node.data_dir / "desired.json") or "{}")
    if {int(id) for id in desired} != {one["id"] for one in instances}:
        yield f"desired.json has instances {sorted(desired)}"
    expected = set()
    for record in records_of(str(node.data_dir)):
        expected |= {f"{record.uid}.json", f"{record.uid}.key"}
        secret = desired.get(str(record.instance_id), {}).get("secret")
        if record.secret().reveal() != secret:
            yield f"the secret of {record.instance_name} on disk is another than its instance's"
    there = {path.name for path in (node.data_dir / "engines").glob("*")}
    if there != expected:
        yield f"engines/ has {sorted(there - expected)}, and lacks {sorted(expected - there)}"
    attempts = json.loads(_text(node.data_dir / "attempts.json") or "{}").get("attempts", {})
    if strangers := attempts.keys() - desired.keys():
        yield f"attempts.json remembers {sorted(strangers)}, which are gone"
    halves = [
        path.name for name in ("desired", "attempts") for path in node.data_dir.glob(f".{name}*")
    ]
    if halves:
        yield f"files were begun and left: {halves}"


def _ports(node: Node) -> Iterator[str]:
    """Ports of the engines' range that are listened on and those of the records are the same."""
    assert node.process is not None
    first, last = node.engine_ports
    listening = {port for port in listened(node.process.pid) if first <= port <= last}
    leased = {record.port for record in records_of(str(node.data_dir))}
    if listening != leased:
        yield f"ports {sorted(listening)} are listened on, records say {sorted(leased)}"


def listened(pid: int) -> set[int]:
    """The TCP ports that are listened on in the network of a process."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in _text(Path(f"/proc/{pid}/net/{table}")).splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == LISTENING:
                found.add(int(local.rpartition(":")[2], 16))
    return found


def _of_database(server: Node, instances: list[Any]) -> Iterator[str]:
    path = server.data_dir / "database.db"
    if not path.exists():
        return
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as database:
        for (said,) in database.execute("PRAGMA integrity_check"):
            if said != "ok":
                yield f"the database: {said}"
        for row in database.execute("PRAGMA foreign_key_check"):
            yield f"the database: {row[0]} row {row[1]} refers to a row of {row[2]} that is gone"
        rows = {id for (id,) in database.execute("SELECT id FROM model_instances")}
        if rows != {one["id"] for one in instances}:
            yield f"the database has instances {sorted(rows)}"


def descriptors(cluster: Cluster) -> dict[tuple[str, str], int]:
    """Node, kind of process -> open file descriptors, at most."""
    found: dict[tuple[str, str], int] = {}
    for one in cluster.processes():
        with suppress(OSError):
            key = (Path(one.home).name, one.kind)
            count = len(os.listdir(f"/proc/{one.pid}/fd"))
            found[key] = max(count, found.get(key, 0))
    return found


def grown(before: Mapping[tuple[str, str], int], after: Mapping[tuple[str, str], int]) -> list[str]:
    return [
        f"{kind} of {node} has {after[node, kind]} descriptors open, had {count}"
        for (node, kind), count in before.items()
        if after.get((node, kind), 0) > count + SLACK
    ]


def _zombies(parent: int) -> list[int]:
    found = []
    for task in _text(Path(f"/proc/{parent}/task/{parent}/children")).split():
        state = _text(Path(f"/proc/{task}/stat")).rpartition(")")[2].split()[:1]
        if state == ["Z"]:
            found.append(int(task))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
