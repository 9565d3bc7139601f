"""How this worker becomes, and stays, a member of its cluster."""

import asyncio
import logging
import socket
import ssl
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from gpustack import __version__
from gpustack.client.agents import AgentClient
from gpustack.config.options import Settings
from gpustack.errors import (
    Conflict,
    Forbidden,
    GPUStackError,
    Unauthorized,
    Unavailable,
)
from gpustack.lib import platform, trust
from gpustack.lib.backoff import delay_s
from gpustack.lib.secrets import new_secret
from gpustack.lib.units import GIB
from gpustack.schemas.workers import ProxyMode, Registered, Registration
from gpustack.worker.detectors import host

logger = logging.getLogger(__name__)


class Membership(BaseModel):
    """`<data-dir>/worker_credential`, mode 0600: who this worker is to its cluster.

    Attributes:
        server_fingerprint: of the server's key, where that is how the server is known.
        tunnel: the server cannot reach this worker's port, so the relay dials.
    """

    worker_id: int
    credential: str
    agent_secret: str
    cluster_id: str
    server_fingerprint: str | None = None
    tunnel: bool = False


def load_membership(data_dir: Path) -> Membership | None:
    path = data_dir / "worker_credential"
    try:
        return Membership.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        logger.warning("cannot read %s, registering anew: %s", path, type(error).__name__)
        return None


def save_membership(data_dir: Path, membership: Membership) -> None:
    platform.write_private(
        data_dir / "worker_credential", membership.model_dump_json(exclude_defaults=True)
    )


def server_trust(
    settings: Settings, known: Membership | None, server_url: str
) -> tuple[str | None, ssl.SSLContext | None]:
    """The fingerprint by which the server is known, if any, and whom to believe that it is it.

    A fingerprint that was given at an earlier start holds until the options say otherwise.

    Raises:
        SettingsError: --server-ca is of no use.
    """
    wanted = settings.server_fingerprint
    if wanted is None and settings.server_ca is None and known is not None:
        wanted = known.server_fingerprint
    if not server_url.startswith("https:"):
        return wanted, None
    return wanted, trust.of_server(settings.server_ca, wanted)


def registration(settings: Settings, address: str, certificate: str) -> Registration:
    """What this machine says of itself. The run id is new at each call: one per agent life."""
    return Registration(
        name=worker_name(settings),
        hostname=_hostname(),
        machine_id=platform.machine_id(),
        boot_id=platform.boot_id(),
        run_id=new_secret(),
        ip=address,
        port=settings.worker_port,
        version=__version__,
        certificate=certificate,
        proxy_mode=ProxyMode(settings.proxy_mode),
        **changeable(settings),
    )


def worker_name(settings: Settings) -> str:
    return settings.worker_name or _hostname() or "worker"


def _hostname() -> str:
    """A name in another encoding than the system's must not keep the machine out."""
    return socket.gethostname().encode(errors="replace").decode()


def changeable(settings: Settings) -> dict[str, Any]:
    """The part of a registration that may change while the agent runs."""
    return {
        "labels": {"os": host.os_name(), "arch": host.arch(), **settings.labels},
        "system_reserved_ram_bytes": int(settings.system_reserved.ram * GIB),
        "system_reserved_vram_bytes": int(settings.system_reserved.vram * GIB),
    }


class Enrolment:
    """Registers with the join token once, then announces itself with the credential it got.

    Attributes:
        membership: as the server confirmed it last; None until this worker has ever joined.
        news: set while the server has not heard of `registration` as it is now.
    """

    def __init__(
        self,
        *,
        data_dir: Path,
        server_url: str,
        join_token: str,
        registration: Registration,
        fingerprint: str | None = None,
        tls: ssl.SSLContext | None = None,
        first_s: float = 0.1,
        limit_s: float = 10.0,
        refused_s: float = 60.0,
    ) -> None:
        self.registration = registration
        self.membership = load_membership(data_dir)
        self._fingerprint, self._tls = fingerprint, tls
        self._data_dir = data_dir
        self._url = server_url
        self._token = join_token
        self._first_s, self._limit_s, self._refused_s = first_s, limit_s, refused_s
        self.news = asyncio.Event()
        self._registered_again = False
        self._foreign: str | None = None

    def tell(self, **said: Any) -> None:
        """This worker says something else of itself from now on."""
        self.registration = self.registration.model_copy(update=said)
        self.news.set()

    def told_tunnel(self, tunnel: bool) -> None:
        """The server says whether requests get here by tunnel; the relay reads it from the file."""
        known = self.membership
        if known is None or known.tunnel == tunnel:
            return
        now = known.model_copy(update={"tunnel": tunnel})
        try:
            save_membership(self._data_dir, now)
        except OSError as error:  # a full disk, perhaps: the next heartbeat says it again
            logger.warning("the relay cannot be told how requests get here: %s", error)
            return
        self.membership = now
        logger.info("the server %s this worker's port", "cannot reach" if tunnel else "reaches")

    def client(self, credential: str) -> AgentClient:
        """To call the server with."""
        return AgentClient(self._url, credential, tls=self._tls)

    def secret(self) -> str | None:
        """What the server shows when it calls this worker."""
        return self.membership.agent_secret if self.membership else None

    async def join(self) -> Membership:
        """Return once the server has confirmed this worker; tries for ever.

        A refusal stops nothing that runs: it is logged, and asked again every `refused_s`; a
        conflict, which may pass, every `limit_s`.
        """
        failures, said = 0, ""
        while True:
            try:
                return await self._attempt()
            except Unavailable as error:
                failures += 1
                wait_s = delay_s(failures, first_s=self._first_s, limit_s=self._limit_s)
                why = str(error)
            except Conflict as error:  # perhaps with this machine's own life before its restart
                wait_s, why = self._limit_s, str(error)
            except GPUStackError as error:
                wait_s, why = self._refused_s, str(error)
            if why != said:
                logger.warning("cannot join the cluster, trying again: %s", why)
                said = why
            await asyncio.sleep(wait_s)

    async def _attempt(self) -> Membership:
        known = self.membership
        if known is None:
            return self._accept(await self._register())
        try:
            async with self.client(known.credential) as client:
                answer = await client.announce(known.worker_id, self.registration)
            self._registered_again = False  # all is well: the next loss may be mended too
            return self._accept(answer)
        except Unauthorized:
            # Once: two agents with one name would else take it from each other for ever.
            if self._registered_again:
                raise Unauthorized(
                    self._foreign
                    or f"the server at {self._url} does not know this worker's credential, also "
                    "after it registered again"
                ) from None
        answer = await self._register()
        self._registered_again = True
        return self._accept(answer)

    async def _register(self) -> Registered:
        async with self.client(self._token) as client:
            return await client.register(self.registration)

    def _accept(self, answer: Registered) -> Membership:
        known = self.membership
        if known is not None and known.cluster_id != answer.cluster_id:
            self._foreign = (
                f"the server at {self._url} is of cluster {answer.cluster_id}, this worker of "
                f"cluster {known.cluster_id}: it does not join, and what runs keeps running; to "
                f"move it, stop it and delete {self._data_dir / 'worker_credential'}"
            )
            raise Forbidden(self._foreign)
        credential = answer.credential or (known.credential if known else "")
        membership = Membership(
            worker_id=answer.worker_id,
            credential=credential,
            agent_secret=answer.agent_secret,
            cluster_id=answer.cluster_id,
            server_fingerprint=self._fingerprint,
            tunnel=known is not None and known.tunnel,
        )
        if membership != known:
            save_membership(self._data_dir, membership)
            self.membership = membership
        return membership
