"""What differs by operating system, and nothing else does: locks, owner-only files, processes."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Coroutine
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TypeVar

T = TypeVar("T")

WINDOWS = sys.platform == "win32"

if WINDOWS:
    import msvcrt
else:
    import fcntl


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end, on uvloop where there is one."""
    if WINDOWS:
        return asyncio.run(main)
    import uvloop  # absent on Windows

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


# --- files ---------------------------------------------------------------------------------


def write_private(path: Path, data: str | bytes) -> None:
    """Put `data` into `path`, atomically, readable by its owner alone (mode 0600)."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    raw = data.encode() if isinstance(data, str) else data
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # 0600 by definition
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def remove_unfinished(folder: Path, name: str = "*", *, older_than_s: float = 0.0) -> None:
    """Remove what `write_private` has left beside files `name` where its process was killed.

    For who knows that nobody writes them now, or that nobody takes `older_than_s` for it.
    """
    for path in folder.glob(f".{name}.????????"):  # as `tempfile` ends names
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime >= older_than_s:
                path.unlink()


def sync_folder(folder: Path) -> None:
    """Return once the names in `folder` would survive a power cut, where the system can say so."""
    if not WINDOWS:
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def give_to_owner_of(place: Path, file: Path) -> None:
    """Root gives `file` to whoever owns `place`; what others make is theirs already."""
    if not WINDOWS and os.geteuid() == 0:
        owner = place.stat()
        os.chown(file, owner.st_uid, owner.st_gid)


def lock(file: IO[Any], *, shared: bool = False) -> bool:
    """Take the exclusive lock on an open file; False if another process holds it.

    The lock goes with the file descriptor: it ends when the last copy of it is closed, so with
    the process however it ends.

    Args:
        shared: together with others who take it so, where the system can.
    """
    try:
        if WINDOWS:
            # A byte far beyond the content, so that the content stays readable to others.
            file.seek(1 << 30)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            file.seek(0)
        else:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(file.fileno(), kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


# --- this machine --------------------------------------------------------------------------


def default_data_dir(platform: str = sys.platform, appdata: str | None = None) -> Path:
    if platform == "win32":
        return Path(appdata or os.environ.get("APPDATA", "C:\\ProgramData")) / "gpustack"
    return Path("/var/lib/gpustack")


def machine_id() -> str:
    """The same for the life of this installation of the operating system."""
    for place in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        with contextlib.suppress(OSError):
            if text := Path(place).read_text().strip():
                return text
    return f"{uuid.getnode():012x}"


def boot_id() -> str:
    """New at each boot of this machine, the same until then."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    import psutil

    return str(int(psutil.boot_time()))


# --- processes -----------------------------------------------------------------------------


def start_ticks(pid: int) -> int | None:
    """When `pid` started, in an arbitrary unit; None if no live process has that pid.

    With the boot id it names one process for ever: a pid alone is used again.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()  # a name in it may be any bytes
    except OSError:
        return None if Path("/proc/self").exists() else _start_centis(pid)
    fields = stat.rpartition(b")")[2].split()
    return None if fields[0] in b"ZX" else int(fields[19])  # field 22 of proc(5), after the name


def _start_centis(pid: int) -> int | None:
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return round(process.create_time() * 100)
    except psutil.Error:
        return None


def process_environment(pid: int) -> dict[str, str]:
    """The environment `pid` was started with; empty when it is gone or not ours to read."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {} if Path("/proc/self").exists() else environment_by_psutil(pid)
    pairs = (item.partition("=") for item in raw.decode(errors="replace").split("\0") if item)
    return {key: value for key, _, value in pairs}


def environment_by_psutil(pid: int) -> dict[str, str]:
    """The same where there is no /proc."""
    import psutil

    try:
        return psutil.Process(pid).environ()
    except (psutil.Error, OSError):
        return {}


def open_files(pid: int) -> list[str]:
    """What `pid` has open, as /proc names it; empty when it is gone or not ours to read."""
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


def sees_all_processes() -> bool:
    """Whether pids are those of the machine, and not of a container.

    Source: Linux, include/linux/proc_ns.h, PROC_PID_INIT_INO: the number of the first namespace.
    """
    try:
        return os.readlink("/proc/self/ns/pid") == f"pid:[{0xEFFFFFFC}]"
    except OSError:
        return True  # systems without namespaces


def live_pids() -> list[int]:
    """The processes of this machine that are not zombies."""
    if not Path("/proc/self").exists():
        import psutil

        return psutil.pids()
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and start_ticks(int(name))]


def process_group(pid: int) -> int | None:
    """The process group of `pid`; None when it is gone."""
    if WINDOWS:
        return pid
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def group_alive(group: int) -> bool:
    """Whether any live process (zombies do not count) is in the process group `group`."""
    if WINDOWS:
        return start_ticks(group) is not None
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    if not Path("/proc/self").exists():
        return True
    for pid in live_pids():
        with contextlib.suppress(OSError):
            if os.getpgid(pid) == group:
                return True
    return False


def kill_group(group: int, *, force: bool) -> None:
    """Ask (or, with `force`, make) every process of `group` end. Nothing happens if it is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if WINDOWS:
            os.kill(group, signal.SIGTERM)
        else:
            os.killpg(group, signal.SIGKILL if force else signal.SIGTERM)


def signal_name(number: int) -> str:
    """Such as SIGKILL; "" where it has no name here, as most real-time signals have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return ""


def oom_kills() -> int | None:
    """How many processes the kernel has ended for lack of memory; None where it does not say.

    Of our own control group where that counts, else of the whole machine.
    """
    for path in (_memory_events(), Path("/proc/vmstat")):
        with contextlib.suppress(OSError, ValueError):
            if path is not None:
                for line in path.read_text().splitlines():
                    if line.startswith("oom_kill "):
                        return int(line.split()[1])
    return None


@lru_cache(maxsize=1)
def _memory_events() -> Path | None:
    """The counts of our control group; the topmost one has none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                return Path(f"/sys/fs/cgroup/{line[4:].lstrip('/')}/memory.events")
    return None


async def wait_exit(pid: int) -> None:
    """Return when `pid`, child of ours or not, is no longer alive.

    The caller has checked that the pid is the process it means, after this was entered or
    before; a pid that is already gone returns at once.
    """
    if not hasattr(os, "pidfd_open"):
        while start_ticks(pid) is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
        return
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        await wait_readable(fd)
    finally:
        os.close(fd)


async def wait_readable(fd: int) -> None:
    """Return when there is something to read from `fd`, its end included."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(fd)


# --- roles and their launcher --------------------------------------------------------------


def listen(host: str, port: int, *, backlog: int = 4096) -> socket.socket:
    """A listening TCP socket with SO_REUSEADDR. At "::" it answers by IPv4 as well.

    Raises:
        OSError: the port is taken, or the address is not one of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        if not WINDOWS:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if host == "::":  # whatever the system does unasked
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        opened.bind((host, port))
        opened.listen(backlog)
        opened.setblocking(False)
    except BaseException:
        opened.close()
        raise
    return opened


def notice_dead_peer(connection: socket.socket, *, unacknowledged_s: float | None = None) -> None:
    """Have the kernel end a connection whose other side has vanished without a word.

    A host that lost its power or its cable sends no reset. The peer is asked after 15 s of
    silence and given up 15 s later. An engine may think for hours: its kernel answers all the
    same.

    Args:
        unacknowledged_s: how long what was sent may wait for its acknowledgement, which no
            question is asked about; None: the kernel's own patience, about 15 min. Linux counts
            a live peer that does not read as well, so never set it where clients take their
            time.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 15),
        ("TCP_KEEPINTVL", 5),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", int((unacknowledged_s or 0) * 1000)),  # 0: the kernel's own
    ):
        number = getattr(socket, name, None)  # each system has some of them
        if number is not None:
            connection.setsockopt(socket.IPPROTO_TCP, number, value)


def outgoing_ports() -> tuple[range, frozenset[int]] | None:
    """The ports that this system gives to whoever connects, and those among all that it keeps back.

    None where it does not say.
    """
    folder = Path("/proc/sys/net/ipv4")
    try:
        first, last = map(int, (folder / "ip_local_port_range").read_text().split())
        kept = (folder / "ip_local_reserved_ports").read_text().strip()
    except (OSError, ValueError):
        return None
    reserved: set[int] = set()
    for item in filter(None, kept.split(",")):
        low, _, high = item.partition("-")
        reserved.update(range(int(low), int(high or low) + 1))
    return range(first, last + 1), frozenset(reserved)


def connections_to(port: int) -> int | None:
    """How many TCP connections by IPv4 a listener on `port` has; None where nobody says."""
    try:
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    except OSError:
        return None
    established, end = "01", f":{port:04X}"
    fields = (line.split(maxsplit=4) for line in lines)
    return sum(line[1].endswith(end) and line[3] == established for line in fields)


def read_json_line(fd: int) -> dict[str, Any]:
    """The first line of a pipe, as JSON, leaving what follows unread."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(fd, 1)
        if not byte:
            raise EOFError("the launcher closed the pipe before it said how to start")
        line += byte
    return dict(json.loads(line))
