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
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gpustack.cli.lock_file import LockFile
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
SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2}
CHECK_S = 30.0
#: For the loop to carry out signals that came before they were blocked.
HEARD_S = 0.01


@dataclass
class Role:
    """One role and the process it has now.

    Attributes:
        starting: held while a process of it is being started.
    """

    name: str
    boot: Callable[[], Boot]
    fds: tuple[int, ...]
    process: asyncio.subprocess.Process | None = None
    starting: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def alive(self) -> asyncio.subprocess.Process | None:
        """Its process, unless that has ended."""
        return self.process if self.process and self.process.returncode is None else None

    def order(self, word: str) -> None:
        """Say `word` to the process, if there is one."""
        if self.alive and self.alive.stdin:
            with suppress(OSError, RuntimeError):
                self.alive.stdin.write(word.encode() + b"\n")

    async def start(self) -> str:
        """Start a process; answers why that was impossible, or nothing."""
        async with self.starting:
            command = (sys.executable, "-m", "gpustack.cli.role", self.name)
            try:
                self.process = await asyncio.create_subprocess_exec(
                    *command, stdin=asyncio.subprocess.PIPE, pass_fds=self.fds
                )
            except (OSError, RuntimeError) as error:  # no process, descriptor or thread is left
                return str(error)
            if self.process.stdin:
                self.process.stdin.write(self.boot().line())
            return ""


def run(settings: Settings, arguments: list[str], reload: Callable[[], Settings]) -> int:
    """Run a node until it is told to stop. Answers the exit code.

    Args:
        arguments: of the command line, for our own restart.
        reload: reads the settings anew.
    """
    # A stop must reach the launcher, not kill what it has not become yet.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    handover: dict[str, Any] = json.loads(os.environ.pop(HANDOVER, "{}"))
    try:
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = LockFile(settings.data_dir, handover.get("lock"))
        sockets = Sockets(settings, handover.get("sockets", {}), patient=lock.left_behind)
    except SettingsError as error:
        logger.error("%s", error)  # noqa: TRY400  the sentence is for the user, a traceback not
        return 1
    except OSError as error:
        logger.error("data directory %s: %s", settings.data_dir, error.strerror)  # noqa: TRY400
        return 1
    launcher = Launcher(settings, arguments, reload, lock, sockets)
    return asyncio.run(launcher.run(handover.get("draining", [])))


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
        lock: LockFile,
        sockets: Sockets,
    ) -> None:
        self._settings = settings
        self._arguments = arguments
        self._reload = reload
        self._lock = lock
        self._sockets = sockets
        self._life = new_secret()[:8]
        self._ready = False
        self._refused, self._refusals = "", 0
        self._draining: set[int] = set()
        self._roles = list(self._plan())
        self._stop = asyncio.Event()
        self._restart = asyncio.Event()
        self._impatient = asyncio.Event()

    async def run(self, draining: list[int]) -> int:
        self._catch_signals()
        self._say()
        self._draining.update(draining)
        async with asyncio.TaskGroup() as group:
            replacing = group.create_task(self._replace())
            tasks = [group.create_task(self._keep(role)) for role in self._roles]
            tasks += [group.create_task(self._reap(pid)) for pid in draining]
            tasks.append(group.create_task(self._announce()))
            await self._stop.wait()
            replacing.cancel()  # first: what it becomes would know nothing of a stop
            await self._stop_roles()
            for task in tasks:
                task.cancel()
        self._lock.release()
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

        def boot() -> Boot:  # the settings of that moment
            return Boot(settings=to_json(self._settings), sockets=numbers, extra=extra)

        return Role(name, boot, (*numbers.values(), *fds))

    async def _keep(self, role: Role) -> None:
        """Start `role`, and again whenever it ends without having been told to."""
        failures = 0
        while not self._stop.is_set():
            began = time.monotonic()
            reason = await role.start() or await _end_of(role)
            if self._stop.is_set():
                break
            failures = 1 if time.monotonic() - began > STEADY_S else failures + 1
            # The first restart does not wait: what depends on this role does.
            pause_s = delay_s(failures - 1, first_s=BACKOFF_FIRST_S, limit_s=BACKOFF_LIMIT_S)
            logger.warning(
                "%s ended (%s); it is started again in %.1f s", role.name, reason, pause_s
            )
            await asyncio.sleep(pause_s)

    async def _reap(self, pid: int) -> None:
        """A role of the life before this one, which finishes its streams."""
        await platform.wait_exit(pid)
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222  it has ended: this only reaps
        self._draining.discard(pid)

    # --- how it ends -----------------------------------------------------------------------

    async def _stop_roles(self) -> None:
        """Gateways drain, then engines stop, then the server: each outlives what it serves."""
        for names in ({"gateway", "relay"}, {"agent"}, {"server"}):
            async with asyncio.TaskGroup() as step:
                for role in self._roles:
                    if role.name in names:
                        step.create_task(self._stop_role(role))
                if "gateway" in names:
                    for pid in self._draining:
                        gone = platform.wait_exit(pid)
                        step.create_task(self._end("gateway", pid, gone))

    async def _stop_role(self, role: Role) -> None:
        async with role.starting:  # one that is being started is told as well
            pass
        if role.name == "agent" and not role.alive and self._has_engines():
            if reason := await role.start():  # nobody else knows how to stop them
                logger.error("engines are left running: no agent can be started: %s", reason)
        if role.alive:
            role.order("stop")
            await self._end(role.name, role.alive.pid, role.alive.wait())

    def _has_engines(self) -> bool:
        """Whether an agent, of this life or another, has left engines."""
        return any((self._settings.data_dir / "engines").glob("*.json"))

    async def _end(self, name: str, pid: int, gone: Coroutine[Any, Any, Any]) -> None:
        """Return when the process is gone; killed when its time is up or we are in a hurry."""
        ended = asyncio.ensure_future(gone)
        hurry = asyncio.ensure_future(self._impatient.wait())
        # In a hurry the agent still stops its engines: nothing may stay behind.
        first = {ended} if name == "agent" else {ended, hurry}
        await asyncio.wait(first, timeout=STOP_S[name], return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not ended.done():
            logger.warning("%s %d did not end in time and is killed", name, pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
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
                self._settings = replace(self._settings, debug=self._reload().debug)
            except GPUStackError as error:
                logger.error("not reloaded: %s", error)  # noqa: TRY400
                return
            level = "DEBUG" if self._settings.debug else "INFO"
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
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # before any child could inherit it

    # --- how it is replaced ----------------------------------------------------------------

    async def _replace(self) -> None:
        """At each SIGUSR2: become a new launcher, or say why not and go on."""
        while True:
            await self._restart.wait()
            self._restart.clear()
            try:
                await self._check()
                settings = self._reload()
                if settings.data_dir != self._settings.data_dir:
                    raise SettingsError("--data-dir cannot change while the node runs")
                with self._sockets.handed_over(settings) as sockets:
                    await self._exec(sockets)
            except (GPUStackError, OSError) as error:
                self._refused, self._refusals = str(error), self._refusals + 1
                logger.error("not restarted: %s", error)  # noqa: TRY400
                self._say()

    async def _check(self) -> None:
        """Have the program that is installed now check the settings.

        Raises:
            SettingsError: they are impossible.
        """
        command = [sys.executable, "-m", "gpustack", "config", "check", *self._arguments]
        checking = await asyncio.create_subprocess_exec(
            *command, stderr=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL
        )
        try:
            async with asyncio.timeout(CHECK_S):
                _, errors = await checking.communicate()
        except TimeoutError:
            raise SettingsError(f"the check of the settings took over {CHECK_S:g} s") from None
        finally:
            if checking.returncode is None:
                checking.kill()
        if checking.returncode != 0:
            raise SettingsError(errors.decode(errors="replace").strip().removeprefix("Error: "))

    async def _exec(self, sockets: dict[str, list[Any]]) -> None:
        """Become a new launcher with the same pid, lock and sockets. Returns only if we stop.

        The pipes to the roles close, since no descriptor is inherited that is not named here:
        server and agent leave at once, gateways and relay when their streams have ended.
        """
        # From here on a signal waits for the new launcher; those that came before are carried out.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            await asyncio.sleep(HEARD_S)
            if self._stop.is_set():
                return
            pids = {role.alive.pid for role in self._roles if role.alive} | self._draining
            lock = self._lock.hand_over()
            os.environ[HANDOVER] = json.dumps(
                {"lock": lock, "sockets": sockets, "draining": [*pids]}
            )
            logger.info("restarting")
            os.execv(  # noqa: S606  our own interpreter and module
                sys.executable, [sys.executable, "-m", "gpustack", "start", *self._arguments]
            )
        finally:
            os.environ.pop(HANDOVER, None)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    # --- what it tells ---------------------------------------------------------------------

    def _say(self) -> None:
        """Write who runs here into the lock file, for `restart` and the command line."""
        said = {
            "pid": os.getpid(),
            "port": self._settings.port if self._settings.is_server else None,
            "life": self._life,
            "ready": self._ready,
            "refusals": self._refusals,
            "refused": self._refused,
        }
        self._lock.say(said)

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
                logger.info("user admin's password, unless it was changed, is in %s", password)
        else:
            logger.info("worker is ready for %s", self._settings.server_url)


async def _end_of(role: Role) -> str:
    """How the process of `role` ended, once it has."""
    code = await role.process.wait() if role.process else 0
    return f"signal {-code}" if code < 0 else f"exit code {code}"


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
