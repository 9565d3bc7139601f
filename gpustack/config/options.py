"""The start options: declared once, here and in `common`, `server` and `worker`.

Command line, environment, YAML file, help text, reference pages and validation are all made from
the fields of `Settings`; an option that is not a field does not exist.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gpustack.config.common import CommonOptions
from gpustack.config.option import Json, Option, PortRange, Reserved, Text
from gpustack.config.server import ServerOptions
from gpustack.config.worker import WorkerOptions

__all__ = [
    "FILE_KEYS",
    "VARIABLES",
    "WAITING",
    "Option",
    "PortRange",
    "Reserved",
    "Settings",
    "defaults",
    "options",
    "shown_default",
]

#: Keys of the config file that are no options.
FILE_KEYS = {
    "resources": Text(
        "Declared devices, processors and memory instead of detected ones: see devices.md.",
        "声明的设备、处理器和内存，代替自动检测：见 devices.md。",
    )
}

#: Variables that are no options.
VARIABLES = {
    "HF_ENDPOINT": Text("Hugging Face Hub mirror.", "Hugging Face Hub 镜像地址。"),
    "HF_TOKEN": Text("Same as --huggingface-token.", "等同于 --huggingface-token。"),
    "GPUSTACK_DISABLE_DYNAMIC_LINK_LLAMA_BOX": Text(
        "Use the statically linked llama-box.", "使用静态链接的 llama-box。"
    ),
    "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY": Text(
        "Honoured by downloads and by calls to other hosts; never used between server, workers and "
        "instances.",
        "用于下载和访问其他主机；服务器、工作节点和实例之间的通信从不使用。",
    ),
}

#: Options that nothing reads yet; whoever gives one is told. A test holds this list to the truth,
#: so it can only shrink.
WAITING = frozenset(
    """
    disable_rpc_servers disable_update_check distributed_worker_port_range
    enable_hf_transfer enable_hf_xet enable_ray gateway_kubeconfig image_name_override image_repo
    model_catalog_file namespace ollama_library_base_url pipx_path ray_args
    ray_client_server_port ray_dashboard_agent_grpc_port ray_dashboard_agent_listen_port
    ray_dashboard_port ray_metrics_export_port ray_node_manager_port ray_object_manager_port
    ray_port ray_runtime_env_agent_port ray_worker_port_range rpc_server_args
    rpc_server_port_range service_discovery_name system_default_container_registry
    """.split()
)


@dataclass(frozen=True, kw_only=True)
class Settings(WorkerOptions, ServerOptions, CommonOptions):
    """What `gpustack start` was told. Building one touches nothing."""

    resources: Json | None = None

    @property
    def is_server(self) -> bool:
        """Whether this node runs the control plane."""
        return self.server_url is None

    @property
    def has_worker(self) -> bool:
        return self.server_url is not None or not self.disable_worker

    @property
    def https_alone(self) -> bool:
        """Whether --port is the HTTPS port, so that nothing is served to others without TLS."""
        return self.ssl_certfile is not None and self.port == self.tls_port

    @property
    def gateways(self) -> int:
        """How many processes of this server's node are gateways, or a gateway too."""
        if self.gateway_mode == "disabled":
            return 1
        return min(self.gateway_concurrency, os.cpu_count() or 1)

    @property
    def labels(self) -> dict[str, str]:
        return dict(label.split("=", 1) for label in self.worker_labels)


def options() -> Iterator[Option]:
    """Every start option, in the order of help."""
    for spec in dataclasses.fields(Settings):
        if "option" in spec.metadata:
            yield spec.metadata["option"]


def shown_default(value: Any) -> str:
    """A plain default as documents write it; empty where there is none."""
    if value is None or value is False or value == ():
        return ""
    return (
        json.dumps(value)
        if isinstance(value, tuple) and not isinstance(value, PortRange)
        else (str(value))
    )


def defaults() -> dict[str, Any]:
    """By key; None where the default depends on other options or on the machine."""
    return {spec.name: spec.default for spec in dataclasses.fields(Settings)}
