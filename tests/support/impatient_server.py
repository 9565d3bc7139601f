"""A control plane that takes workers for silent after seconds: a process, on one of several hosts.

It has no gateway in front: agents and tests speak to the API itself.
"""

import asyncio
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx

from gpustack.config import load
from gpustack.lib import logs, platform
from gpustack.lib.role import Boot, leave
from gpustack.lib.secrets import new_secret
from gpustack.server import app
from tests.support.hosts import Host
from tests.support.ports import free_ports
from tests.support.wait import soon


class ImpatientServer:
    """
    Args:
        silent_after_s: at least the 10 s between two heartbeats.

    Attributes:
        process: the one that runs now; each start makes another on the same data.
    """

    def __init__(
        self, data_dir: Path, host: Host, *, silent_after_s: float, grace_s: float
    ) -> None:
        self.data_dir = data_dir
        self.log = data_dir.with_suffix(".log")
        self.host = host
        self.port = free_ports(1)
        self.url = f"http://{host.address}:{self.port}"
        self._silent_after_s = silent_after_s
        self._admin = new_secret()
        settings = load.load(
            {"data_dir": str(data_dir), "disable_worker": True, "unreachable_grace": str(grace_s)},
            {},
        ).settings
        secrets = {"local_admin": self._admin, "gateway_credential": new_secret()}
        self._boot = Boot(settings=load.to_json(settings), extra=secrets)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        arguments = [self.host.address, str(self.port), str(self._silent_after_s)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.host.command, sys.executable, "-m", __name__, *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )
        assert self.process.stdin is not None
        self.process.stdin.write(self._boot.line())
        self.process.stdin.flush()
        soon(self._answers, f"the server answers\n{self.log.read_text()}", within_s=60)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            assert self.process.stdin is not None
            self.process.stdin.close()

    def http(self) -> httpx.Client:
        """A client of the API, as an administrator."""
        headers = {"Authorization": f"Bearer {self._admin}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False)

    def instances(self, model: str) -> list[dict[str, Any]]:
        with self.http() as http:
            answer = http.get("/v2/model-instances")
        answer.raise_for_status()
        return [one for one in answer.json()["items"] if one["model_name"] == model]

    def _answers(self) -> bool:
        try:
            with self.http() as http:
                return http.get("/healthz").is_success
        except httpx.TransportError:
            return False


async def _serve(address: str, port: int, silent_after_s: float) -> None:
    boot = Boot.read()
    boot.sockets["api"] = platform.listen(address, port).detach()
    await app.run(boot, leave, silent_after=timedelta(seconds=silent_after_s))


if __name__ == "__main__":
    logs.setup("server")
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
