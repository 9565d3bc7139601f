"""A real node: `gpustack start` in processes of its own, on free unprivileged ports."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from gpustack.lib.net import url_host
from gpustack.lib.platform import live_pids, process_environment
from tests.support.hosts import Host
from tests.support.ports import free_ports
from tests.support.wait import soon

ENGINE_PORTS = 16


class Node:
    """One `gpustack start`.

    Args:
        data_dir: kept between starts of the same node.
        server: the node to join; None makes this one a server.
        host: where it runs; None: on this machine itself.
        engine_ports: how many.

    Attributes:
        starter: a command that becomes the launcher, in the same process.
        environment: variables of the launcher, beside those of the tests.
        fds: descriptors that it inherits.
    """

    def __init__(
        self,
        data_dir: Path,
        *options: str,
        server: "Node | None" = None,
        host: Host | None = None,
        engine_ports: int = ENGINE_PORTS,
    ) -> None:
        self.data_dir = data_dir
        self.host = host
        first = free_ports(6 + engine_ports)
        self.port, self.api_port, self.worker_port, self.tls_port = range(first, first + 4)
        self.metrics_port, self.worker_metrics_port = first + 4, first + 5
        self.engine_ports = (first + 6, first + 5 + engine_ports)
        self.log = data_dir.with_suffix(".log")
        self.arguments = [
            "--data-dir", str(data_dir),
            "--worker-port", str(self.worker_port),
            "--worker-metrics-port", str(self.worker_metrics_port),
            "--service-port-range", f"{self.engine_ports[0]}-{self.engine_ports[1]}",
            "--system-reserved", '{"ram": 0, "vram": 0}',
        ]  # fmt: skip
        if server is None:
            self.arguments += ["--port", str(self.port), "--api-port", str(self.api_port)]
            self.arguments += ["--tls-port", str(self.tls_port)]
            self.arguments += ["--metrics-port", str(self.metrics_port)]
        else:
            token = (server.data_dir / "token").read_text().strip()
            self.arguments += ["--server-url", server.url, "--token", token]
            self.arguments += ["--worker-name", data_dir.name]
        self.arguments += options
        self.starter: list[str] = []
        self.environment: dict[str, str] = {}
        self.fds: tuple[int, ...] = ()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log_dir(self) -> Path:
        return self.data_dir / "log"

    @property
    def url(self) -> str:
        address = self.host.address if self.host else "127.0.0.1"
        return f"http://{url_host(address)}:{self.port}"

    def start(self, *, wait: bool = True) -> "Node":
        with self.log.open("ab") as log:
            place = [*(self.host.command if self.host else []), *self.starter]
            clean = {k: v for k, v in os.environ.items() if not k.startswith("GPUSTACK_")}
            self.process = subprocess.Popen(
                [*place, sys.executable, "-m", "gpustack", "start", *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=clean | self.environment,
                pass_fds=self.fds,
            )
        if wait:
            soon(self.ready, f"the node is ready\n{self.log.read_text()}", within_s=90)
        return self

    def ready(self) -> bool:
        """Whether the launcher says so; fails at once when it has ended."""
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        said = self.said()
        return said.get("pid") == self.process.pid and bool(said.get("ready"))

    def said(self) -> dict[str, Any]:
        """What the launcher wrote into the lock file."""
        try:
            return dict(json.loads((self.data_dir / "lock").read_text()))
        except (OSError, ValueError):
            return {}

    def stop(self) -> int:
        """SIGTERM, and the exit code. Nothing of the node may be left."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.kill()

    def kill(self) -> None:
        """End whatever is left, however."""
        for pid in (*self.pids(), *self.engine_pids()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self.process is not None:
            self.process.wait(10)

    def pids(self, role: str | None = None) -> list[int]:
        """The live processes of this node's launcher and roles, or of one role."""
        assert self.process is not None
        found = []
        for pid in live_pids():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                session = os.getsid(pid)
            except OSError:
                continue
            if session == self.process.pid and (role is None or command[3:4] == [role]):
                found.append(pid)
        return found

    def engine_pids(self) -> list[int]:
        """The live processes that this node's agent started as engines."""
        home = str(self.data_dir)
        return [
            pid
            for pid in live_pids()
            if process_environment(pid).get("GPUSTACK_ENGINE_HOME") == home
        ]

    def kill_role(self, role: str) -> int:
        """kill -9 one process of a role; answers its pid."""
        pid = self.pids(role)[0]
        os.kill(pid, signal.SIGKILL)
        return pid

    def http(self, token: str | None = "", **options: Any) -> httpx.Client:
        """A client of the node's public port. Without `token`: as the local administrator."""
        if token == "":
            token = (self.data_dir / "local_admin").read_text().strip()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(
            base_url=self.url, headers=headers, timeout=30, trust_env=False, **options
        )

    def api_key(self) -> str:
        name = {"name": f"test {time.monotonic_ns()}"}
        with self.http() as http:
            return str(http.post("/v2/api-keys", json=name).json()["value"])

    def deploy(self, name: str, path: Path, *, wait: str = "running", **spec: Any) -> int:
        """Deploy a local file; answers the model's id once its instances are in state `wait`."""
        body = {"name": name, "source": "local_path", "local_path": str(path)} | spec
        with self.http() as http:
            answer = http.post("/v2/models", json=body)
            assert answer.status_code == 201, answer.text
            model_id = int(answer.json()["id"])
        replicas = spec.get("replicas", 1)
        self.wait_instances(model_id, lambda found: len(found) == replicas and all(
            one["state"] == wait for one in found
        ), f"{name} is {wait}")  # fmt: skip
        return model_id

    def instances(self, model_id: int) -> list[dict[str, Any]]:
        with self.http() as http:
            answer = http.get("/v2/model-instances", params={"model_id": model_id})
            answer.raise_for_status()
            return list(answer.json()["items"])

    def wait_instances(
        self,
        model_id: int,
        check: Callable[[list[dict[str, Any]]], bool],
        what: str,
        *,
        within_s: float = 60,
    ) -> list[dict[str, Any]]:
        seen: list[dict[str, Any]] = []

        def holds() -> bool:
            seen[:] = self.instances(model_id)
            return check(seen)

        try:
            soon(holds, what, within_s=within_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{seen}\n{self.log.read_text()[-4000:]}") from None
        return seen
