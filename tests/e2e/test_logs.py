"""Logs of gigabytes, from an agent's disk through relay, server and gateway to who asks."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.node import Node
from tests.support.wait import soon

pytestmark = pytest.mark.slow

ROLES = ("agent", "relay", "server", "gateway")
GROWTH_BYTES = 20 << 20
SIZE = 1 << 30  # bytes
#: What engines say: colours, progress, and what is no UTF-8.
ODD = b"\x1b[32mINFO\x1b[0m 50%\r99%\n\xff\xfe\x00\xe4\xb8\n"
LONG = b"x" * (100 << 20)


@pytest.fixture(scope="module")
def instance(node: Node, models: Path) -> int:
    model = node.deploy("tiny", models / "chat.gguf")
    return int(node.instances(model)[0]["id"])


@pytest.fixture(scope="module")
def previous(node: Node, instance: int) -> Path:
    """The log of a run before: a gigabyte that takes no disk, then some lines."""
    path = node.log_dir / "serve" / f"{instance}.log.1"
    with path.open("wb") as file:
        file.truncate(SIZE)
        file.seek(SIZE)
        file.write(b"\n" + ODD + b"".join(b"line %d\n" % n for n in range(100)))
    return path


def resident_bytes(pid: int, field: str) -> int:
    said = Path(f"/proc/{pid}/status").read_text().partition(f"{field}:")[2]
    return int(said.split()[0]) << 10


@contextlib.contextmanager
def without_growth(node: Node) -> Iterator[None]:
    """Nobody on the way may ever have held much more meanwhile than before."""
    pids = {role: pid for role in ROLES for pid in node.pids(role)}
    assert len(pids) == len(ROLES)
    before = {}
    for role, pid in pids.items():
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak counts anew
        before[role] = resident_bytes(pid, "VmRSS")
    yield
    grown = {role: resident_bytes(pid, "VmHWM") - before[role] for role, pid in pids.items()}
    assert max(grown.values()) < GROWTH_BYTES, grown


def opened_by_agent(node: Node, path: Path) -> bool:
    (agent,) = node.pids("agent")
    folder = Path(f"/proc/{agent}/fd")
    found = set()
    for fd in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(fd))
    return str(path) in found


def test_a_log_of_a_gigabyte_passes_without_being_held_anywhere(
    node: Node, instance: int, previous: Path
) -> None:
    where = f"/v2/model-instances/{instance}/logs?previous=true"
    end = b"".join(b"line %d\n" % n for n in range(95, 100))
    with node.http() as http:
        assert http.get(f"{where}&tail=5").content == end  # all is loaded now
        with without_growth(node):
            took_s = []
            for _ in range(5):
                began = time.monotonic()
                assert http.get(f"{where}&tail=5").content == end
                took_s.append(time.monotonic() - began)
            assert min(took_s) < 1  # others use this machine too
            got, last = 0, b""
            with http.stream("GET", f"{where}&download=true") as answer:
                assert "attachment" in answer.headers["content-disposition"]
                for piece in answer.iter_raw(1 << 20):
                    got += len(piece)
                    last = (last + piece)[-4096:]
            assert got == previous.stat().st_size
            assert ODD + b"line 0\n" in last
            assert last.endswith(end)


def test_who_reads_slowly_costs_a_buffer_and_who_leaves_nothing(
    node: Node, instance: int, previous: Path
) -> None:
    where = f"/v2/model-instances/{instance}/logs"
    with without_growth(node), node.http() as http:
        with http.stream("GET", f"{where}?previous=true&tail=-1") as answer:
            pieces = answer.iter_raw(1 << 20)
            for _ in range(5):
                next(pieces)
                time.sleep(0.3)  # a slow reader
            assert opened_by_agent(node, previous)
            assert len(http.get(f"{where}?previous=true&tail=2").content) == 16  # others go on
        soon(lambda: not opened_by_agent(node, previous), "the agent has closed the log")
        present = previous.with_name(f"{instance}.log")
        with http.stream("GET", f"{where}?follow=true&tail=1") as answer:
            pieces = answer.iter_raw()
            assert next(pieces)
            assert opened_by_agent(node, present)  # and nothing more comes
        soon(lambda: not opened_by_agent(node, present), "the agent follows no more")


def test_a_line_of_a_hundred_megabytes_is_a_line(node: Node, instance: int, previous: Path) -> None:
    previous.write_bytes(b"before\n" + LONG)
    with node.http() as http, without_growth(node):
        got = 0
        with http.stream("GET", f"/v2/model-instances/{instance}/logs?previous=1&tail=1") as answer:
            for piece in answer.iter_raw(1 << 20):
                assert not piece.strip(b"x")
                got += len(piece)
        assert got == len(LONG)


def test_an_agent_cuts_what_grows_too_long_and_who_follows_gets_all(
    node: Node, instance: int
) -> None:
    """What the engine itself would write is added to its log, since it has little to say."""
    path = node.log_dir / "serve" / f"{instance}.log"
    lines = b"".join(b"%07d " % n + b"y" * 91 + b"\n" for n in range(600_000))
    with node.http() as http:
        where = f"/v2/model-instances/{instance}/logs"
        with http.stream("GET", f"{where}?follow=true&tail=0") as answer:
            with path.open("ab") as file:
                file.write(lines)
            soon(lambda: path.stat().st_size < len(lines), "it has been cut", within_s=30)
            with path.open("ab") as file:
                file.write(b"after the cut\n")
            got = bytearray()
            for piece in answer.iter_raw():
                got += piece
                if got.endswith(b"after the cut\n"):
                    break
        assert got == lines + b"after the cut\n"
        assert http.get(f"{where}?tail=2").content == lines[-100:] + b"after the cut\n"
        assert http.get(f"{where}?since=1h&tail=-1").content.endswith(lines[-1000:] + got[-14:])
