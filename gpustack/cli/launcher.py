"""The launcher: the process that `gpustack start` is.

It owns the data directory's lock and every listening socket, and keeps the roles running. It
holds no state of its own, so it can replace itself (exec) while sockets, lock and pid stay.
"""

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from gpustack.cli.sockets import Sockets
from gpustack.config.load import to_json
from gpustack.config.options import Settings
from gpustack.errors import GPUStackError, SettingsError
from gpustack.lib import platform
from gpustack.lib.backoff import delay_s
from gpustack.lib.net import url_host
from gpustack.lib.role import Boot
from gpustack.lib.secrets import new_secret

logger = logging.getLogger(__name__)

#: Descriptors, sockets and pids, from a launcher to the one that it becomes.
HANDOVER = "GPUSTACK_HANDOVER"
#: How long each role may take to end. The sum is below systemd's 90 s.
STOP_S = {"gateway": 30.0, "relay": 30.0, "agent": 20.0, "server": 5.0}
#: A role that lived this long is not failing.
STEADY_S = 30.0
BACKOFF_FIRST_S, BACKOFF_LIMIT_S = 0.1, 10.0


@dataclass
class Role:
    """One role and the process it has now."""

    name: str
    boot: Callable[[], Boot]
    fds: tuple[int, ...]
    process: asyncio.subprocess.Process | None = None
    stopping: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def order(self, word: str) -> None:
        """Say `word` to the process, if there is one."""
        if self.process and self.process.stdin and self.process.returncode is None:
            with suppress(OSError, RuntimeError):
                self.process.stdin.write(word.encode() + b"\n")


def run(settings: Settings, arguments: list[str], reload: Callable[[], Settings]) -> int:
    """Run a node until it is told to stop. Answers the exit code.

    Args:
        arguments: of the command line, for our own restart.
        reload: reads the settings anew.
    """
    handover: dict[str, Any] = json.loads(os.environ.pop(HANDOVER, "{}"))
    try:
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock_file, crashed = _lock(settings.data_dir, handover.get("lock"))
        sockets = Sockets(settings, handover.get("sockets", {}), patient=crashed)
    except SettingsError as error:
        logger.error("%s", error)  # noqa: TRY400  the sentence is for the user, a traceback not
        return 1
    except OSError as error:
        logger.error("data directory %s: %s", settings.data_dir, error.strerror)  # noqa: TRY400
        return 1
    launcher = Launcher(settings, arguments, reload, lock_file, sockets)
    return asyncio.run(launcher.run(handover.get("draining", [])))


def _lock(data_dir: Path, inherited: int | None) -> tuple[IO[str], bool]:
    """The lock file, held, and whether an earlier life left it without saying goodbye."""
    if inherited is not None:
        os.set_inheritable(inherited, False)
        return os.fdopen(inherited, "r+"), False
    path = data_dir / "lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    file = os.fdopen(fd, "r+")
    held = platform.lock(file)
    content = file.read().strip()
    if not held:
        pid = json.loads(content).get("pid") if content else "unknown"
        raise SettingsError(
            f"gpustack already runs on data directory {data_dir}: pid {pid}. "
            "Stop it first, or give another --data-dir"
        )
    return file, bool(content)


def file_secret(path: Path) -> str:
    """The secret in `path`, made and written (mode 0600) if it is not there."""
    with suppress(OSError):
        if secret := path.read_text().strip():
            return secret
    secret = new_secret() + new_secret()
    platform.write_private(path, secret + "\n")
    return secret


class Launcher:
    """Keeps the roles of one node running; see the module's docstring."""

    def __init__(
        self,
        settings: Settings,
        arguments: list[str],
        reload: Callable[[], Settings],
        lock_file: IO[str],
        sockets: Sockets,
    ) -> None:
        self._settings = settings
        self._arguments = arguments
        self._reload = reload
        self._lock_file = lock_file
        self._sockets = sockets
        self._life = new_secret()[:8]
        self._ready = False
        self._refused = ""
        self._draining: set[int] = set()
        self._roles = list(self._plan())
        self._stop = asyncio.Event()
        self._restart = asyncio.Event()
        self._impatient = asyncio.Event()

    async def run(self, draining: list[int]) -> int:
        self._say()
        self._catch_signals()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._keep(role)) for role in self._roles]
            tasks += [group.create_task(self._reap(pid)) for pid in draining]
            tasks.append(group.create_task(self._announce()))
            tasks.append(group.create_task(self._replace()))
            await self._stop.wait()
            await self._stop_roles(group)
            for task in tasks:
                task.cancel()
        self._lock_file.seek(0)
        self._lock_file.truncate()  # a clean end: the next start need not wait for our ports
        return 0

    # --- what runs -------------------------------------------------------------------------

    def _plan(self) -> Iterator[Role]:
        """The roles of this node, in the order of their importance for being ready."""
        settings, sockets = self._settings, self._sockets
        join_token = settings.token.reveal() if settings.token else ""
        if settings.is_server:
            gateway = file_secret(settings.data_dir / "gateway_credential")
            local_admin = file_secret(settings.data_dir / "local_admin")
            join_token = new_secret()
            yield self._role(
                "server",
                ("api",),
                gateway_credential=gateway,
                local_admin=local_admin,
                join_token=join_token,
            )
            processes = min(settings.gateway_concurrency, os.cpu_count() or 1)
            counts = _shared_table(settings.data_dir)
            for index in range(processes):
                yield self._role(
                    "gateway",
                    ("public",),
                    counts,
                    index=index,
                    processes=processes,
                    counts_fd=counts,
                    gateway_credential=gateway,
                    api_port=settings.api_port,
                )
        if settings.has_worker:
            url = settings.server_url or f"http://127.0.0.1:{settings.api_port}"
            yield self._role("agent", ("agent",), server_url=url, join_token=join_token)
            yield self._role("relay", ("worker",), agent_port=sockets.port("agent"))

    def _role(self, name: str, listens: tuple[str, ...], *fds: int, **extra: Any) -> Role:
        numbers = {socket_name: self._sockets.fileno(socket_name) for socket_name in listens}
        boot = Boot(settings=to_json(self._settings), sockets=numbers, extra=extra)
        return Role(name, lambda: boot, (*numbers.values(), *fds))

    async def _keep(self, role: Role) -> None:
        """Start `role`, and again whenever it ends without having been told to."""
        failures = 0
        while not role.stopping:
            began = time.monotonic()
            code = await self._run_once(role)
            if role.stopping:
                break
            failures = 1 if time.monotonic() - began > STEADY_S else failures + 1
            # The first restart does not wait: what depends on this role does.
            pause_s = delay_s(failures - 1, first_s=BACKOFF_FIRST_S, limit_s=BACKOFF_LIMIT_S)
            logger.warning("%s ended (%s); it is started again in %.1f s", role.name, code, pause_s)
            await asyncio.sleep(pause_s)
        role.ended.set()

    async def _run_once(self, role: Role) -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "gpustack.cli.role",
            role.name,
            stdin=asyncio.subprocess.PIPE,
            pass_fds=role.fds,
        )
        role.process = process
        if process.stdin:
            process.stdin.write(role.boot().line())
        code = await process.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    async def _reap(self, pid: int) -> None:
        """A role of the life before this one, which finishes its streams."""
        self._draining.add(pid)
        await platform.wait_exit(pid)
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222  it has ended: this only reaps
        self._draining.discard(pid)

    # --- how it ends -----------------------------------------------------------------------

    async def _stop_roles(self, group: asyncio.TaskGroup) -> None:
        """Gateways drain, then engines stop, then the server: each outlives what it serves."""
        for role in self._roles:
            role.stopping = True
        for names in ({"gateway", "relay"}, {"agent"}, {"server"}):
            step = [role for role in self._roles if role.name in names]
            for role in step:
                role.order("stop")
            for role in step:
                await self._ended(role)
        for pid in self._draining:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def _ended(self, role: Role) -> None:
        """Return when `role` has ended; it is killed when its time is up or we are in a hurry."""
        if role.process is None:
            return
        ended = asyncio.ensure_future(role.process.wait())
        hurry = asyncio.ensure_future(self._impatient.wait())
        await asyncio.wait(
            {ended, hurry}, timeout=STOP_S[role.name], return_when=asyncio.FIRST_COMPLETED
        )
        hurry.cancel()
        # In a hurry the agent still stops its engines: nothing may stay behind.
        if not ended.done() and not (self._impatient.is_set() and role.name == "agent"):
            logger.warning("%s did not end in time and is killed", role.name)
            with suppress(ProcessLookupError):
                role.process.kill()
        await ended

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()

        def stop() -> None:
            if self._stop.is_set():
                self._impatient.set()
            self._stop.set()

        def reload() -> None:
            """Apply what can change while running: the log level."""
            try:
                level = "DEBUG" if self._reload().debug else "INFO"
            except GPUStackError as error:
                logger.error("not reloaded: %s", error)  # noqa: TRY400
                return
            logging.getLogger().setLevel(level)
            for role in self._roles:
                role.order(f"level {level}")
            logger.info("log level is now %s", level)

        handlers = {
            signal.SIGTERM: stop,
            signal.SIGINT: stop,
            signal.SIGHUP: reload,
            signal.SIGUSR2: self._restart.set,
        }
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handlers)  # blocked across our own exec

    # --- how it is replaced ----------------------------------------------------------------

    async def _replace(self) -> None:
        """At each SIGUSR2: check the settings in a child, then become a new launcher."""
        while True:
            await self._restart.wait()
            self._restart.clear()
            command = [sys.executable, "-m", "gpustack", "config", "check", *self._arguments]
            checked = await asyncio.create_subprocess_exec(
                *command, stderr=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL
            )
            _, errors = await checked.communicate()
            if checked.returncode == 0:
                self._exec()
            self._refused = errors.decode(errors="replace").strip().removeprefix("Error: ")
            logger.error("not restarted: %s", self._refused)
            self._say()

    def _exec(self) -> None:
        """Become a new launcher with the same pid, lock and sockets. Does not return.

        The pipes to the roles close, since no descriptor is inherited that is not named here:
        server and agent leave at once, gateways and relay when their streams have ended.
        """
        pids = {role.process.pid for role in self._roles if role.process}
        alive = [pid for pid in pids | self._draining if platform.start_ticks(pid) is not None]
        os.set_inheritable(self._lock_file.fileno(), True)
        os.environ[HANDOVER] = json.dumps(
            {
                "lock": self._lock_file.fileno(),
                "sockets": self._sockets.hand_over(),
                "draining": alive,
            }
        )
        logger.info("restarting")
        # A signal in between must reach the new launcher, not kill it before it can listen.
        signal.pthread_sigmask(
            signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2}
        )
        os.execv(  # noqa: S606  our own interpreter and module
            sys.executable, [sys.executable, "-m", "gpustack", "start", *self._arguments]
        )

    # --- what it tells ---------------------------------------------------------------------

    def _say(self) -> None:
        """Write who runs here into the lock file, for `restart` and the command line."""
        said = {
            "pid": os.getpid(),
            "port": self._settings.port if self._settings.is_server else None,
            "life": self._life,
            "ready": self._ready,
            "refused": self._refused,
        }
        content = json.dumps(said)
        self._lock_file.seek(0)
        self._lock_file.write(content)
        self._lock_file.truncate()
        self._lock_file.flush()

    async def _announce(self) -> None:
        """Say when the node answers, and where."""
        name = "public" if self._settings.is_server else "worker"
        host, port = self._sockets.address(name)
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        while not await _answers(host, port):  # noqa: ASYNC110  another process's readiness
            await asyncio.sleep(0.05)
        self._ready = True
        self._say()
        if self._settings.is_server:
            logger.info("gpustack is ready at http://%s:%d", url_host(host), port)
            password = self._settings.data_dir / "initial_admin_password"
            if password.exists():
                logger.info("the first password of user admin is in %s", password)
        else:
            logger.info("worker is ready for %s", self._settings.server_url)


async def _answers(host: str, port: int) -> bool:
    """Whether GET /readyz there is 200 now."""
    try:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            status = await reader.readline()
            writer.close()
            return b" 200 " in status
    except (OSError, TimeoutError):
        return False


def _shared_table(data_dir: Path) -> int:
    """A new, empty file that the gateway processes of this life share, open and already unlinked.

    Those of the life before keep theirs.
    """
    path = data_dir / f".counts-{new_secret()[:8]}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    path.unlink()
    return fd
