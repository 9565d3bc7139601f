"""Options of every node."""

from dataclasses import dataclass
from pathlib import Path

from gpustack.config.option import DETECTED, GENERATED, Group, Text
from gpustack.lib.secrets import Secret

option = Group("common")

GATEWAY_MODES = ("auto", "embedded", "in-cluster", "external", "disabled")


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    config_file: Path | None = option(
        "--config-file", "path", None,
        "YAML file with start options.",
        "包含启动选项的 YAML 文件。",
    )  # fmt: skip
    debug: bool = option(
        "--debug", "bool", False,
        "Debug logging. On Windows without the short form, which belongs to PowerShell.",
        "输出调试日志。Windows 上没有短选项 -d，它由 PowerShell 保留。",
        aliases=("-d",), hot=True,
    )  # fmt: skip
    data_dir: Path = option(
        "--data-dir", "path", None,
        "State directory.",
        "存放状态数据的目录。",
        shown_default=Text(
            "/var/lib/gpustack; %APPDATA%\\gpustack on Windows",
            "/var/lib/gpustack；Windows 上为 %APPDATA%\\gpustack",
        ),
    )  # fmt: skip
    cache_dir: Path = option(
        "--cache-dir", "path", None,
        "Model files and other cached downloads.",
        "模型文件和其他下载内容的缓存目录。",
        shown_default=Text("<data-dir>/cache", "<data-dir>/cache"),
    )  # fmt: skip
    token: Secret | None = option(
        "--token", "secret", None,
        "Shared secret with which workers register; a generated one is kept in <data-dir>/token.",
        "工作节点注册时使用的共享密钥；自动生成的密钥保存在 <data-dir>/token。",
        aliases=("-t",), shown_default=GENERATED,
    )  # fmt: skip
    huggingface_token: Secret | None = option(
        "--huggingface-token", "secret", None,
        "Hugging Face Hub access token.",
        "Hugging Face Hub 的访问令牌。",
        env=("HF_TOKEN",),
    )  # fmt: skip
    advertise_address: str | None = option(
        "--advertise-address", "host", None,
        "Address that other nodes use to reach this one.",
        "其他节点访问本节点时使用的地址。",
        shown_default=DETECTED,
    )  # fmt: skip
    port: int = option(
        "--port", "port", 80,
        "Public HTTP port; with a certificate, HTTPS where it is --tls-port too.",
        "对外的 HTTP 端口；配置证书且与 --tls-port 相同时为 HTTPS。",
    )  # fmt: skip
    tls_port: int = option(
        "--tls-port", "port", 443,
        "Public HTTPS port, open when a certificate is given.",
        "对外的 HTTPS 端口，配置证书后开放。",
    )  # fmt: skip
    bin_dir: Path = option(
        "--bin-dir", "path", None,
        "Extra executables, e.g. versioned backends such as llama-box_v0.0.155.",
        "额外的可执行文件，例如带版本号的后端 llama-box_v0.0.155。",
        shown_default=Text("<data-dir>/bin", "<data-dir>/bin"),
    )  # fmt: skip
    pipx_path: Path | None = option(
        "--pipx-path", "path", None,
        "pipx executable that installs pinned versions of Python backends.",
        "用于安装指定版本 Python 后端的 pipx 可执行文件。",
        shown_default=Text("found on PATH", "在 PATH 中查找"),
    )  # fmt: skip
    enable_ray: bool = option(
        "--enable-ray", "bool", False,
        "Run Ray so that vLLM can span several workers; Linux only.",
        "运行 Ray，使 vLLM 可以跨多个工作节点；仅支持 Linux。",
    )  # fmt: skip
    ray_args: tuple[str, ...] = option(
        "--ray-args", "arguments", (),
        "Extra arguments of `ray start`, passed through verbatim; repeat as --ray-args=--verbose.",
        "原样传给 `ray start` 的额外参数；可重复，写作 --ray-args=--verbose。",
    )  # fmt: skip
    ray_node_manager_port: int = option(
        "--ray-node-manager-port", "port", 40098,
        "Ray node manager.",
        "Ray 节点管理器的端口。",
    )  # fmt: skip
    ray_object_manager_port: int = option(
        "--ray-object-manager-port", "port", 40099,
        "Ray object manager.",
        "Ray 对象管理器的端口。",
    )  # fmt: skip
    ray_runtime_env_agent_port: int = option(
        "--ray-runtime-env-agent-port", "port", 40100,
        "Ray runtime environment agent.",
        "Ray 运行时环境代理的端口。",
    )  # fmt: skip
    ray_dashboard_agent_grpc_port: int = option(
        "--ray-dashboard-agent-grpc-port", "port", 40101,
        "Ray dashboard agent over gRPC.",
        "Ray 仪表盘代理的 gRPC 端口。",
    )  # fmt: skip
    ray_dashboard_agent_listen_port: int = option(
        "--ray-dashboard-agent-listen-port", "port", 52365,
        "Ray dashboard agent over HTTP.",
        "Ray 仪表盘代理的 HTTP 端口。",
    )  # fmt: skip
    ray_metrics_export_port: int = option(
        "--ray-metrics-export-port", "port", 40103,
        "Ray metrics.",
        "Ray 指标的端口。",
    )  # fmt: skip
    ollama_library_base_url: str = option(
        "--ollama-library-base-url", "url", "https://registry.ollama.ai",
        "Registry for models named after the Ollama library.",
        "Ollama 模型库的地址。",
    )  # fmt: skip
    system_default_container_registry: str = option(
        "--system-default-container-registry", "str", "docker.io",
        "Registry that system images are pulled from.",
        "拉取系统镜像的镜像仓库。",
    )  # fmt: skip
    image_repo: str = option(
        "--image-repo", "str", "gpustack/gpustack",
        "Image repository of this project.",
        "本项目的镜像名。",
    )  # fmt: skip
    image_name_override: str | None = option(
        "--image-name-override", "str", None,
        "Full image name used instead of the computed one.",
        "完整的镜像名，代替自动得出的镜像名。",
    )  # fmt: skip
    gateway_mode: str = option(
        "--gateway-mode", "str", "auto",
        "Where the public gateway runs; auto means embedded outside Kubernetes and in-cluster "
        "inside it; disabled means that one process binds --host:--port and --api-port is not "
        "opened.",
        "对外网关运行的位置；auto 在 Kubernetes 外为 embedded，在其中为 in-cluster；disabled "
        "表示由一个进程监听 --host:--port，不开放 --api-port。",
        choices=GATEWAY_MODES,
    )  # fmt: skip
    gateway_kubeconfig: Path | None = option(
        "--gateway-kubeconfig", "path", None,
        "Kubeconfig for gateway mode external.",
        "网关模式为 external 时使用的 kubeconfig。",
    )  # fmt: skip
    gateway_concurrency: int = option(
        "--gateway-concurrency", "count", 16,
        "Gateway processes at most; never more than there are CPUs.",
        "网关进程数的上限；不会超过 CPU 数。",
    )  # fmt: skip
    service_discovery_name: str | None = option(
        "--service-discovery-name", "str", None,
        "DNS name of the discovery service in Kubernetes.",
        "Kubernetes 中服务发现的 DNS 名称。",
    )  # fmt: skip
    namespace: str | None = option(
        "--namespace", "str", None,
        "Kubernetes namespace for gateway routes and model instances.",
        "网关路由和模型实例所在的 Kubernetes 命名空间。",
    )  # fmt: skip
