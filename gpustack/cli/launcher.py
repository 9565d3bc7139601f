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
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpustack.cli import activation, notify, reload_config
from gpustack.cli.lock_file import LockFile
from gpustack.cli.notify import Notifier
from gpustack.cli.reload_config import Answer, request, taken_in
from gpustack.cli.roles import Plan, Role
from gpustack.cli.sockets import Sockets
from gpustack.config.load import hot_json
from gpustack.config.options import Settings
from gpustack.errors import GPUStackError, SettingsError
from gpustack.gateway.tls import Certificate
from gpustack.lib import logs, platform, trust
from gpustack.lib.backoff import delay_s
from gpustack.lib.net import url_host
from gpustack.lib.secrets import new_secret
from gpustack.schemas.wire import WORKER_CERTIFICATE_FILE

logger = logging.getLogger(__name__)

#: Descriptors, sockets, pids and whom to notify, from a launcher to the one that it becomes.
HANDOVER = "GPUSTACK_HANDOVER"
#: How long each role may take to end: those that drain, longer than they let requests go on. The
#: steps' sum is below the time that a service manager is told (`service_files`).
STOP_S = {
    "gateway": 35.0, "relay": 35.0, "agent": 20.0, "server": 5.0, "server+gateway": 36.0,
    "database": 3.0,
}  # fmt: skip
#: A role that lived this long is not failing.
STEADY_S = 30.0
BACKOFF_FIRST_S, BACKOFF_LIMIT_S = 0.1, 10.0
SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2}
CHECK_S = 30.0
#: What outlives a role of that name is told by these files below the data directory.
LEFT_BEHIND = {"agent": "engines/*.json", "database": "postgres/data/postmaster.pid"}
#: Set for whatever runs in a pod.
KUBERNETES = "KUBERNETES_SERVICE_HOST"
#: For the loop to carry out signals that came before they were blocked.
HEARD_S = 0.01
#: How the node stops, step by step: each outlives what it serves.
STOP_STEPS = (
    ({"gateway", "relay", "server+gateway"}, "open requests are finished"),
    ({"agent"}, "engines are ended"),
    ({"server", "server+gateway"}, "the server is ended"),
    ({"database"}, "the database is ended"),
)


#: Reads the settings anew; given what the running node was told beside them, by key.
Reload = Callable[[Mapping[str, Any]], Settings]


def run(settings: Settings, arguments: list[str], reload: Reload) -> int:
    """Run a node until it is told to stop. Answers the exit code.

    Args:
        arguments: of the command line, for our own restart.
    """
    # A stop must reach the launcher, not kill what it has not become yet.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    handover: dict[str, Any] = json.loads(os.environ.pop(HANDOVER, "{}"))
    notifier = Notifier(notify.take(os.environ) or handover.get("notify", ""))
    try:
        given = activation.take(os.environ)
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = LockFile(settings.data_dir, handover.get("lock"))
        _check_certificate(settings)  # better said once, here, than by each role
        inherited = handover.get("sockets", {})
        sockets = Sockets(settings, inherited, given, patient=lock.left_behind)
    except SettingsError as error:
        logger.error("%s", error)  # noqa: TRY400  the sentence is for the user, a traceback not
        return 1
    except OSError as error:
        logger.error("data directory %s: %s", settings.data_dir, error.strerror)  # noqa: TRY400
        return 1
    if settings.is_server and settings.gateway_mode == "auto" and KUBERNETES in os.environ:
        logger.info("--gateway-mode auto is embedded: this version has none of Kubernetes' own")
    launcher = Launcher(settings, arguments, reload, lock, sockets, notifier)
    return asyncio.run(launcher.run(handover.get("draining", [])))


def _check_certificate(settings: Settings) -> None:
    """Log what is odd about the certificate.

    Raises:
        SettingsError: it cannot be served.
    """
    for warning in Certificate.check(settings):
        logger.warning("%s", warning)


class Launcher:
    """Keeps the roles of one node running; see the module's docstring."""

    def __init__(
        self,
        settings: Settings,
        arguments: list[str],
        reload: Reload,
        lock: LockFile,
        sockets: Sockets,
        notifier: Notifier,
    ) -> None:
        self._settings = settings
        self._arguments = arguments
        self._reload = reload
        self._overrides: dict[str, Any] = {}
        self._lock = lock
        self._sockets = sockets
        self._notifier = notifier
        self._life = new_secret()[:8]
        self._ready = False
        self._refused, self._refusals = "", 0
        self._draining: set[int] = set()
        self._roles = list(Plan(lambda: self._settings, sockets).roles())
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

    async def _keep(self, role: Role) -> None:
        """Start `role`, and again whenever it ends without having been told to."""
        failures = 0
        while not self._stop.is_set():
            began = time.monotonic()
            reason = await role.start() or await role.end()
            if self._stop.is_set():
                break
            failures = 1 if time.monotonic() - began > STEADY_S else failures + 1
            # The first restart does not wait: what depends on this role does.
            pause_s = delay_s(failures - 1, first_s=BACKOFF_FIRST_S, limit_s=BACKOFF_LIMIT_S)
            said = f"{role.name} ended ({reason}); it is started again in {pause_s:.1f} s"
            logger.warning(said)
            if not self._ready:
                self._notifier.status(f"starting: {said}")
            await asyncio.sleep(pause_s)

    async def _reap(self, pid: int) -> None:
        """A role of the life before this one, which finishes its streams."""
        await platform.wait_exit(pid)
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222  it has ended: this only reaps
        self._draining.discard(pid)

    # --- how it ends -----------------------------------------------------------------------

    async def _stop_roles(self) -> None:
        for names, what in STOP_STEPS:
            self._notifier.stopping(f"stopping: {what}")
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
        if not role.alive and self._has_left_something(role.name):
            if reason := await role.start():  # nobody else knows how to stop it
                logger.error("what it started goes on: no %s can run: %s", role.name, reason)
        if role.alive:
            role.order("stop")
            await self._end(role.name, role.alive.pid, role.stopped())

    def _has_left_something(self, name: str) -> bool:
        """Whether a role that has ended, in this life or another, has left what it started."""
        left = LEFT_BEHIND.get(name)
        return left is not None and any(self._settings.data_dir.glob(left))

    async def _end(self, name: str, pid: int, gone: Coroutine[Any, Any, Any]) -> None:
        """Return when the process is gone; killed when its time is up or we are in a hurry."""
        ended = asyncio.ensure_future(gone)
        hurry = asyncio.ensure_future(self._impatient.wait())
        # Also in a hurry nothing may stay behind that outlives its role.
        first = {ended} if name in LEFT_BEHIND else {ended, hurry}
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

        handlers = {
            signal.SIGTERM: stop,
            signal.SIGINT: stop,
            signal.SIGHUP: self._take_in,
            signal.SIGUSR2: self._restart.set,
        }
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # before any child could inherit it

    def _take_in(self) -> None:
        """Apply what can change while running, and answer whoever asked for it."""
        serving = self._ready and not self._stop.is_set()
        if serving:
            self._notifier.reloading("reloading")
        outcome, who, answer = self._where, "", Answer()
        try:
            who, asked = request(self._settings.data_dir)
            every = self._overrides | asked
            overrides = {key: value for key, value in every.items() if value is not None}
            fresh = self._reload(overrides)
            _check_certificate(self._settings)  # its files are read again as well
            self._overrides = overrides
            self._settings, answer = taken_in(self._settings, fresh)
        except GPUStackError as error:
            answer = Answer(problem=str(error))
            logger.error("not reloaded: %s", error)  # noqa: TRY400
            outcome = f"{outcome}; not reloaded: {error}"
        else:
            logs.set_level(debug=self._settings.debug)
            for role in self._roles:
                role.order(f"reload {json.dumps(hot_json(self._settings))}")
            logger.info("reloaded; changed: %s", ", ".join(answer.changed) or "nothing")
            if answer.waiting:
                logger.warning("changed, and needs a restart: %s", ", ".join(answer.waiting))
        if who:
            reload_config.answer(self._settings.data_dir, who, answer)
        if serving:
            self._notifier.ready(outcome)

    # --- how it is replaced ----------------------------------------------------------------

    async def _replace(self) -> None:
        """At each SIGUSR2: become a new launcher, or say why not and go on."""
        while True:
            await self._restart.wait()
            self._restart.clear()
            if self._ready:
                self._notifier.reloading("restarting")
            try:
                await self._check()
                settings = self._reload({})
                if settings.data_dir != self._settings.data_dir:
                    raise SettingsError("--data-dir cannot change while the node runs")
                _check_certificate(settings)
                with self._sockets.handed_over(settings) as sockets:
                    await self._exec(sockets)
            except (GPUStackError, OSError) as error:
                self._refused, self._refusals = str(error), self._refusals + 1
                logger.error("not restarted: %s", error)  # noqa: TRY400
                self._say()
                if self._ready and not self._stop.is_set():
                    self._notifier.ready(f"{self._where}; not restarted: {error}")

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
            handover = {
                "lock": lock,
                "sockets": sockets,
                "draining": [*pids],
                "notify": self._notifier.address,
            }
            os.environ[HANDOVER] = json.dumps(handover)
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
            "port": self._sockets.own()[1] if self._settings.is_server else None,
            "life": self._life,
            "ready": self._ready,
            "refusals": self._refusals,
            "refused": self._refused,
        }
        self._lock.say(said)

    @property
    def _where(self) -> str:
        """What this node is, for people to read."""
        if not self._settings.is_server:
            return f"worker of {self._settings.server_url}"
        places = []
        public = "https" if self._settings.https_alone else "http"
        for name, scheme in (("public", public), ("tls", "https")):
            if name in self._sockets:
                host, port = self._sockets.reachable(name)
                places.append(f"{scheme}://{url_host(host)}:{port}")
        return f"serving at {' and '.join(places)}"

    async def _announce(self) -> None:
        """Say when the node answers, and where."""
        self._notifier.status("starting")
        own = None if self._settings.is_server else self._settings.data_dir
        address = self._sockets.reachable("worker") if own else self._sockets.own()
        while not await _answers(*address, own):  # noqa: ASYNC110  another process's readiness
            await asyncio.sleep(0.05)
        self._ready = True
        self._say()
        self._notifier.ready(self._where)
        logger.info("gpustack is ready: %s", self._where)
        password = self._settings.data_dir / "initial_admin_password"
        if self._settings.is_server and password.exists():
            logger.info("user admin's password, unless it was changed, is in %s", password)


async def _answers(host: str, port: int, worker: Path | None) -> bool:
    """Whether it says there that it is ready now.

    Args:
        worker: the data directory whose relay it is, if it is one: relays speak TLS.
    """
    try:
        tls, path = None, b"/readyz"
        if worker is not None:
            path = b"/healthz"
            text = (worker / WORKER_CERTIFICATE_FILE).read_text()
            tls = trust.exactly(trust.certificate_in(text))
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection(host, port, ssl=tls)
            head = b"GET %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            writer.write(head % path)
            status = await reader.readline()
            writer.close()
            return b" 200 " in status
    except (OSError, TimeoutError, ValueError):  # no certificate yet, or half of one
        return False
