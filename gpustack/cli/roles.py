"""The roles of a node as its launcher sees them: which there are, and the process of each."""

import asyncio
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from gpustack.cli.sockets import Sockets
from gpustack.config.load import to_json
from gpustack.config.options import Settings
from gpustack.lib import platform
from gpustack.lib.net import url_host
from gpustack.lib.role import Boot
from gpustack.lib.secrets import new_secret


@dataclass
class Role:
    """One role and the process it has now.

    Attributes:
        boot: how to start; called with facts that are new for each process.
        two_stops: told to stop it drains and serves on; told again it ends.
        starting: held while a process of it is being started.
    """

    name: str
    boot: Callable[..., Boot]
    fds: tuple[int, ...]
    two_stops: bool = False
    process: asyncio.subprocess.Process | None = None
    starting: asyncio.Lock = field(default_factory=asyncio.Lock)
    _draining: IO[bytes] | None = None  # at its end once the process has drained

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
                with ExitStack() as theirs:
                    new = self._new_facts(theirs)
                    self.process = await asyncio.create_subprocess_exec(
                        *command,
                        stdin=asyncio.subprocess.PIPE,
                        pass_fds=(*self.fds, *new.values()),
                    )
            except (OSError, RuntimeError) as error:  # no process, descriptor or thread is left
                return str(error)
            if self.process.stdin:
                self.process.stdin.write(self.boot(**new).line())
            return ""

    def _new_facts(self, theirs: ExitStack) -> dict[str, int]:
        """Descriptors for the next process alone; `theirs` closes our copies."""
        if not self.two_stops:
            return {}
        read, write = os.pipe()
        theirs.callback(os.close, write)
        if self._draining:
            self._draining.close()
        self._draining = os.fdopen(read, "rb", buffering=0)
        return {"drained_fd": write}

    async def end(self) -> str:
        """Wait for the process; answers how it ended."""
        code = await self.process.wait() if self.process else 0
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    async def stopped(self) -> None:
        """Wait until what it was told by `stop` is done."""
        draining, self._draining = self._draining, None
        if draining is None:
            await self.end()
            return
        with draining:
            await platform.wait_readable(draining.fileno())


class Plan:
    """Makes the roles of a node.

    Args:
        settings: as they are when a role starts.
    """

    def __init__(self, settings: Callable[[], Settings], sockets: Sockets) -> None:
        self._settings = settings
        self._sockets = sockets

    def roles(self) -> Iterator[Role]:
        """The roles, in the order of their importance for being ready."""
        settings, sockets = self._settings(), self._sockets
        join_token = settings.token.reveal() if settings.token else ""
        if settings.is_server:
            join_token = new_secret()
            if settings.database_url.reveal().startswith("embedded://"):
                yield self._role("database", ())
            secrets = {
                "gateway_credential": file_secret(settings.data_dir / "gateway_credential"),
                "local_admin": file_secret(settings.data_dir / "local_admin"),
                "join_token": join_token,
                "gateway_url": _url(sockets.own()),
            }
            if settings.gateway_mode == "disabled":
                yield self._role("server+gateway", ("public", "tls", "own", "metrics"), **secrets)
            else:
                yield self._role("server", ("api", "metrics"), **secrets)
                yield from self._gateways(secrets["gateway_credential"])
        if settings.has_worker:
            url = settings.server_url or _own_url(settings, sockets)
            listens = ("agent", "worker-metrics")
            yield self._role("agent", listens, server_url=url, join_token=join_token)
            yield self._role("relay", ("worker",), agent_port=sockets.port("agent"))

    def _gateways(self, credential: str) -> Iterator[Role]:
        settings = self._settings()
        processes = settings.gateways
        counts = _shared_table(settings.data_dir)
        for index in range(processes):
            yield self._role(
                "gateway",
                ("public", "tls", "own"),
                counts,
                index=index,
                processes=processes,
                counts_fd=counts,
                gateway_credential=credential,
                api_port=self._sockets.port("api"),
            )

    def _role(self, name: str, listens: tuple[str, ...], *fds: int, **extra: Any) -> Role:
        numbers = {each: self._sockets.fileno(each) for each in listens if each in self._sockets}

        def boot(**new: Any) -> Boot:
            return Boot(settings=to_json(self._settings()), sockets=numbers, extra=extra | new)

        return Role(name, boot, (*numbers.values(), *fds), two_stops=name == "server+gateway")


def _own_url(settings: Settings, sockets: Sockets) -> str:
    """Where this node's agent reaches its server."""
    is_one = settings.gateway_mode == "disabled"
    return _url(sockets.own() if is_one else sockets.reachable("api"))


def _url(address: tuple[str, int]) -> str:
    host, port = address
    return f"http://{url_host(host)}:{port}"


def file_secret(path: Path) -> str:
    """The secret in `path`, made and written (mode 0600) if it is not there."""
    with suppress(OSError):
        if secret := path.read_text().strip():
            return secret
    secret = new_secret() + new_secret()
    platform.write_private(path, secret + "\n")
    return secret


def _shared_table(data_dir: Path) -> int:
    """A new, empty file that the gateway processes of this life share, open and already unlinked.

    Those of the life before keep theirs.
    """
    path = data_dir / f".counts-{new_secret()[:8]}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    path.unlink()
    return fd
