"""The start options: declared once, here.

Command line, environment, YAML file, help text and reference page are all made from the fields
of `Settings`; an option that is not a field does not exist.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gpustack.lib.secrets import Secret


class PortRange(NamedTuple):
    """Ports first..last, both included."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


class Reserved(NamedTuple):
    """GiB kept back from scheduling on each worker (ram) and on each GPU (vram)."""

    ram: float
    vram: float


@dataclass(frozen=True)
class Option:
    """How one field of `Settings` is spelled and explained.

    Attributes:
        flag: long option; the field's name, with dashes.
        kind: which parser of `values` reads it.
        shown_default: what help says where the default is not a plain value.
    """

    flag: str
    kind: str
    group: str
    meaning: str
    aliases: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    shown_default: str | None = None

    @property
    def key(self) -> str:
        """The name in YAML and in `Settings`."""
        return self.flag[2:].replace("-", "_")

    @property
    def environment(self) -> tuple[str, ...]:
        """Variables that set it, the first that is set wins."""
        return (f"GPUSTACK_{self.key.upper()}", *self.env)


def option(flag: str, kind: str, default: Any, group: str, meaning: str, **more: Any) -> Any:
    return field(
        default=default,
        metadata={"option": Option(flag, kind, group, meaning, **more)},
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `gpustack start` was told. Building one touches nothing."""

    # common
    config_file: Path | None = option(
        "--config-file", "path", None, "common", "YAML file with start options."
    )
    debug: bool = option("--debug", "bool", False, "common", "Debug logging.", aliases=("-d",))
    data_dir: Path = option(
        "--data-dir", "path", None, "common", "State directory.",
        shown_default="/var/lib/gpustack; %APPDATA%\\gpustack on Windows",
    )  # fmt: skip
    cache_dir: Path = option(
        "--cache-dir", "path", None, "common", "Model files and other cached downloads.",
        shown_default="<data-dir>/cache",
    )  # fmt: skip
    token: Secret | None = option(
        "--token", "secret", None, "common",
        "Shared secret with which workers register; a generated one is kept in <data-dir>/token.",
        aliases=("-t",), shown_default="generated",
    )  # fmt: skip
    huggingface_token: Secret | None = option(
        "--huggingface-token", "secret", None, "common", "Hugging Face Hub access token.",
        env=("HF_TOKEN",),
    )  # fmt: skip
    advertise_address: str | None = option(
        "--advertise-address", "host", None, "common",
        "Address that other nodes use to reach this one.", shown_default="detected",
    )  # fmt: skip
    port: int = option("--port", "port", 80, "common", "Public HTTP port.")
    bin_dir: Path = option(
        "--bin-dir", "path", None, "common",
        "Extra executables, e.g. versioned backends such as llama-box_v0.0.155.",
        shown_default="<data-dir>/bin",
    )  # fmt: skip
    gateway_concurrency: int = option(
        "--gateway-concurrency", "count", 16, "common",
        "Gateway processes at most; never more than there are CPUs.",
    )  # fmt: skip

    # server
    host: str = option(
        "--host", "host", "0.0.0.0", "server", "Address the public port binds to."
    )  # fmt: skip
    api_port: int = option(
        "--api-port", "port", 8080, "server",
        "Port of the control-plane API behind the gateway; on loopback only.",
    )  # fmt: skip
    disable_worker: bool = option(
        "--disable-worker", "bool", False, "server", "No built-in worker in the server node."
    )
    bootstrap_password: Secret | None = option(
        "--bootstrap-password", "secret", None, "server",
        "First password of user admin; a generated one is kept in "
        "<data-dir>/initial_admin_password and must be changed at first login.",
        shown_default="generated",
    )  # fmt: skip
    database_url: Secret = option(
        "--database-url", "secret", None, "server", "Database; SQLite.",
        shown_default="sqlite:///<data-dir>/database.db",
    )  # fmt: skip
    force_auth_localhost: bool = option(
        "--force-auth-localhost", "bool", False, "server",
        "Requests from the loopback address need credentials as well.",
    )  # fmt: skip

    # worker
    server_url: str | None = option(
        "--server-url", "url", None, "worker",
        "Server to join; set means that this node runs only a worker.", aliases=("-s",),
    )  # fmt: skip
    worker_name: str | None = option(
        "--worker-name", "str", None, "worker", "Name of this worker.", shown_default="host name"
    )
    worker_port: int = option("--worker-port", "port", 10150, "worker", "Public port of a worker.")
    service_port_range: PortRange = option(
        "--service-port-range", "ports", PortRange(40000, 40063), "worker",
        "Ports for model instances, both ends included.",
    )  # fmt: skip
    log_dir: Path = option(
        "--log-dir", "path", None, "worker", "Logs; serve/<instance id>.log below it.",
        shown_default="<data-dir>/log",
    )  # fmt: skip
    system_reserved: Reserved = option(
        "--system-reserved", "reserved", Reserved(2, 1), "worker",
        "GiB kept back from scheduling on each worker (ram) and each GPU (vram).",
        shown_default='{"ram": 2, "vram": 1}',
    )  # fmt: skip
    worker_labels: tuple[str, ...] = option(
        "--worker-labels", "list", (), "worker", "Labels key=value of this worker; repeatable."
    )

    @property
    def is_server(self) -> bool:
        """Whether this node runs the control plane."""
        return self.server_url is None

    @property
    def has_worker(self) -> bool:
        return self.server_url is not None or not self.disable_worker

    @property
    def labels(self) -> dict[str, str]:
        return dict(label.split("=", 1) for label in self.worker_labels)


def options() -> Iterator[Option]:
    """Every start option, in the order of help."""
    for spec in dataclasses.fields(Settings):
        yield spec.metadata["option"]


def defaults() -> dict[str, Any]:
    return {spec.name: spec.default for spec in dataclasses.fields(Settings)}
