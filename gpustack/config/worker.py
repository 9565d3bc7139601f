"""Options of a node that runs engines."""

from dataclasses import dataclass
from pathlib import Path

from gpustack.config.option import DETECTED, Group, PortRange, Reserved, Text

option = Group("worker")


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    server_url: str | None = option(
        "--server-url", "url", None,
        "Server to join; set means that this node runs only a worker.",
        "要加入的服务器；设置后本节点只运行工作节点。",
        aliases=("-s",),
    )  # fmt: skip
    server_ca: Path | None = option(
        "--server-ca", "path", None,
        "Authorities that may sign the server's certificate, as PEM, instead of this system's.",
        "可以签发服务器证书的颁发机构（PEM），代替本系统信任的颁发机构。",
    )  # fmt: skip
    server_fingerprint: str | None = option(
        "--server-fingerprint", "fingerprint", None,
        "Fingerprint of the server's public key, which is then all that counts; remembered in "
        "<data-dir>.",
        "服务器公钥的指纹，设置后只以它为准；会记在 <data-dir> 中。",
    )  # fmt: skip
    worker_name: str | None = option(
        "--worker-name", "name", None,
        "Name of this worker.",
        "本工作节点的名称。",
        shown_default=Text("host name", "主机名"),
    )  # fmt: skip
    worker_ip: str | None = option(
        "--worker-ip", "host", None,
        "Older name of --advertise-address.",
        "--advertise-address 的旧名称。",
        deprecated="--advertise-address",
    )  # fmt: skip
    worker_ifname: str | None = option(
        "--worker-ifname", "str", None,
        "Network interface whose address this worker advertises.",
        "本工作节点对外公布其地址的网络接口。",
        shown_default=DETECTED,
    )  # fmt: skip
    worker_port: int = option(
        "--worker-port", "port", 10150,
        "Public port of a worker.",
        "工作节点的对外端口。",
    )  # fmt: skip
    worker_metrics_port: int = option(
        "--worker-metrics-port", "port", 10151,
        "Prometheus metrics of the worker; a config file may call it metrics_port on a node that "
        "runs only a worker.",
        "工作节点 Prometheus 指标的端口；在只运行工作节点时，配置文件中也可写作 metrics_port。",
    )  # fmt: skip
    disable_worker_metrics: bool = option(
        "--disable-worker-metrics", "bool", False,
        "No worker metrics.",
        "不提供工作节点指标。",
    )  # fmt: skip
    disable_rpc_servers: bool = option(
        "--disable-rpc-servers", "bool", False,
        "No llama-box RPC servers.",
        "不运行 llama-box RPC 服务器。",
    )  # fmt: skip
    service_port_range: PortRange = option(
        "--service-port-range", "ports", PortRange(40000, 40063),
        "Ports for model instances, both ends included.",
        "模型实例的端口范围，两端均包含。",
    )  # fmt: skip
    rpc_server_port_range: PortRange = option(
        "--rpc-server-port-range", "ports", PortRange(40064, 40095),
        "Ports for llama-box RPC servers, both ends included.",
        "llama-box RPC 服务器的端口范围，两端均包含。",
    )  # fmt: skip
    ray_worker_port_range: PortRange = option(
        "--ray-worker-port-range", "ports", PortRange(40200, 40999),
        "Ports for Ray worker processes, both ends included.",
        "Ray 工作进程的端口范围，两端均包含。",
    )  # fmt: skip
    distributed_worker_port_range: PortRange = option(
        "--distributed-worker-port-range", "ports", PortRange(40200, 40999),
        "Ports for distributed workers of any engine (NCCL, TCP stores), both ends included; "
        "shares its pool with --ray-worker-port-range.",
        "各引擎分布式进程（NCCL、TCP 存储）的端口范围，两端均包含；与 --ray-worker-port-range "
        "共用。",
    )  # fmt: skip
    log_dir: Path = option(
        "--log-dir", "path", None,
        "Logs; serve/<instance id>.log below it.",
        "日志目录；其下为 serve/<实例 id>.log。",
        shown_default=Text("<data-dir>/log", "<data-dir>/log"),
    )  # fmt: skip
    rpc_server_args: tuple[str, ...] = option(
        "--rpc-server-args", "arguments", (),
        "Extra arguments of the RPC servers, verbatim; repeat as --rpc-server-args=--verbose.",
        "原样传给 RPC 服务器的额外参数；可重复，写作 --rpc-server-args=--verbose。",
    )  # fmt: skip
    system_reserved: Reserved = option(
        "--system-reserved", "reserved", Reserved(2, 1),
        "GiB kept back from scheduling on each worker (ram) and each GPU (vram).",
        "调度时为每个工作节点（ram）和每个 GPU（vram）保留的 GiB 数。",
        shown_default=Text('{"ram": 2, "vram": 1}', '{"ram": 2, "vram": 1}'), hot=True,
    )  # fmt: skip
    tools_download_base_url: str | None = option(
        "--tools-download-base-url", "url", None,
        "Mirror for tools such as llama-box.",
        "下载 llama-box 等工具的镜像地址。",
        shown_default=Text("upstream releases", "上游发布页"),
    )  # fmt: skip
    enable_hf_transfer: bool = option(
        "--enable-hf-transfer", "bool", False,
        "Download from the Hugging Face Hub with hf_transfer.",
        "使用 hf_transfer 从 Hugging Face Hub 下载。",
    )  # fmt: skip
    enable_hf_xet: bool = option(
        "--enable-hf-xet", "bool", False,
        "Download from the Hugging Face Hub with Xet.",
        "使用 Xet 从 Hugging Face Hub 下载。",
    )  # fmt: skip
    proxy_mode: str = option(
        "--proxy-mode", "str", "direct",
        "How requests reach this worker: direct, gateways dial its port (a tunnel where the server "
        "cannot); tunnel, it dials them.",
        "请求到达本工作节点的方式：direct，由网关连接其端口（服务器无法连接时改用隧道）；tunnel，"
        "由本工作节点主动连接网关。",
        choices=("direct", "tunnel"),
    )  # fmt: skip
    worker_labels: tuple[str, ...] = option(
        "--worker-labels", "labels", (),
        "Labels key=value of this worker; repeatable.",
        "本工作节点的标签 key=value；可重复。",
        hot=True,
    )  # fmt: skip
