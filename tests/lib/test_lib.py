"""The floor that everybody stands on."""

import asyncio
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gpustack.lib import platform, units
from gpustack.lib.backoff import delay_s
from gpustack.lib.locks import take_over
from gpustack.lib.logs import ContextFilter, log_context
from gpustack.lib.net import can_bind, host_of, is_loopback
from gpustack.lib.secrets import Secret, digest, same
from tests.support.wait import soon


def test_backoff_doubles_up_to_its_limit() -> None:
    assert [delay_s(n, first_s=10, limit_s=300) for n in range(8)] == [
        0, 10, 20, 40, 80, 160, 300, 300,
    ]  # fmt: skip


def test_durations_are_read_as_people_write_them() -> None:
    assert [units.seconds(text) for text in ("90", "30s", "5m", "1h30m")] == [90, 30, 300, 5400]
    with pytest.raises(ValueError, match="want a duration"):
        units.seconds("soon")


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LOCALHOST.", "::ffff:127.1.2.3"],
)
def test_loopback_addresses_are_known(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["10.0.0.1", "::", "localhost.evil.example", "127.0.0.1.nip.io", "", "2130706433"]
)
def test_nothing_else_passes_for_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_the_host_of_an_authority_is_found() -> None:
    hosts = ["a", "a:80", "[::1]:80", "[::1]"]
    assert [host_of(host) for host in hosts] == ["a", "a", "::1", "::1"]


@pytest.mark.parametrize(
    "authority",
    ["", ":80", "::1", "a:", "a:b", "a:80@evil", "a@b", "127.0.0.1%evil", "[127.0.0.1]evil",
     "[127.0.0.1]", "[::1]x", "[::1]:", "[::1", "::1]", "[::1%lo]", "a b", "a:80\n", "a/b"],
)  # fmt: skip
def test_what_is_no_authority_has_no_host(authority: str) -> None:
    assert host_of(authority) is None


def test_a_taken_port_cannot_be_bound() -> None:
    with platform.listen("127.0.0.1", 0) as taken:
        assert not can_bind("127.0.0.1", taken.getsockname()[1])


def test_a_private_file_is_its_owners_alone_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "secret"
    platform.write_private(path, "one")
    platform.write_private(path, "two")
    assert path.read_text() == "two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_what_was_being_written_when_its_writer_was_killed_is_removed(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from gpustack.lib import platform; "
        "os.replace = lambda *_: os.kill(os.getpid(), 9); "
        "platform.write_private(Path(sys.argv[1]), 'secret')"
    )
    for name in ("one.json", "two.json"):
        subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    platform.write_private(tmp_path / "one.json", "kept")
    platform.remove_unfinished(tmp_path, "one.json", older_than_s=60)
    assert len(list(tmp_path.iterdir())) == 3
    platform.remove_unfinished(tmp_path, "one.json")
    assert [path.name[:5] for path in sorted(tmp_path.iterdir())] == [".two.", "one.j"]
    platform.remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]


def test_a_secret_prints_as_stars_and_compares_as_itself() -> None:
    secret = Secret("hunter2")
    assert "hunter2" not in f"{secret} {secret!r} {secret:>9} %s" % secret
    assert same(secret.reveal(), "hunter2")
    assert len(digest("x")) == 64


def test_a_pid_alone_does_not_name_a_process() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ticks = platform.start_ticks(child.pid)
    assert ticks is not None
    assert ticks == platform.start_ticks(child.pid)
    assert ticks >= (platform.start_ticks(os.getpid()) or 0)
    child.kill()
    soon(lambda: platform.start_ticks(child.pid) is None, "a zombie does not count as alive")
    child.communicate()
    assert platform.start_ticks(child.pid) is None


def orphan() -> tuple[int, int]:
    """The pid of a process in a group of its own that is no child of ours, and a descriptor.

    The process ends when the descriptor is closed.
    """
    script = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'input()'], "
        "stdin=sys.stdin, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, "
        "start_new_session=True); print(p.pid); p.returncode = 0"
    )
    reader, writer = os.pipe()
    parent = subprocess.run([sys.executable, "-c", script], stdin=reader, stdout=subprocess.PIPE)
    os.close(reader)
    return int(parent.stdout), writer


async def test_the_end_of_a_process_is_noticed_also_when_it_is_not_ours() -> None:
    pid, held = orphan()
    assert platform.group_alive(pid)
    os.close(held)
    async with asyncio.timeout(5):
        await platform.wait_exit(pid)
    soon(lambda: not platform.group_alive(pid), "the group is gone")


def test_a_successor_waits_for_the_lock_and_then_ends_its_holder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from gpustack.lib.locks import take_over\n"
        "with take_over(Path(sys.argv[1])): print('held', flush=True); input()"
    )
    path = tmp_path / "role.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with take_over(path, patience_s=0.3):
        assert holder.wait(5) == -9
        assert path.read_text().strip() == str(os.getpid())
    holder.communicate()


async def test_log_context_follows_child_tasks() -> None:
    record = logging.LogRecord("n", 20, "f", 1, "m", (), None)

    async def child() -> None:
        ContextFilter().filter(record)

    with log_context(instance=7):
        async with asyncio.TaskGroup() as group:
            group.create_task(child())
    assert record.__dict__["facts"] == " instance=7"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say")
def test_the_ports_that_the_system_gives_away_are_known() -> None:
    outgoing = platform.outgoing_ports()
    assert outgoing is not None
    given, _ = outgoing
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        assert one.getsockname()[1] in given
    script = (
        "from pathlib import Path; from gpustack.lib import platform; "
        "net = Path('/proc/sys/net/ipv4'); "
        "(net / 'ip_local_port_range').write_text('30000 30999'); "
        "(net / 'ip_local_reserved_ports').write_text('8080,30010-30012'); "
        "given, kept = platform.outgoing_ports(); print(given, sorted(kept))"
    )
    elsewhere = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", script], capture_output=True, text=True
    )
    if elsewhere.returncode:
        pytest.skip("no network namespace can be made here")
    assert elsewhere.stdout == "range(30000, 31000) [8080, 30010, 30011, 30012]\n"


def test_without_proc_the_environment_of_a_process_is_known_too() -> None:
    own = platform.process_environment(os.getpid())
    assert "PATH" in own
    assert platform.environment_by_psutil(os.getpid()) == own
    assert platform.environment_by_psutil(2**22 + 1) == {}  # Linux has no such pid
