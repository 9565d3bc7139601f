"""Options of a node that runs the control plane."""

from dataclasses import dataclass
from pathlib import Path

from gpustack.config.option import GENERATED, Group, Json, Text
from gpustack.lib.secrets import Secret

option = Group("server")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    host: str = option(
        "--host", "host", "0.0.0.0",
        "Address the public port binds to.",
        "对外端口监听的地址。",
    )  # fmt: skip
    api_port: int = option(
        "--api-port", "port", 8080,
        "Port of the control-plane API behind the gateway; on loopback only.",
        "网关后面控制平面 API 的端口；只监听回环地址。",
    )  # fmt: skip
    metrics_port: int = option(
        "--metrics-port", "port", 10161,
        "Prometheus metrics of the server.",
        "服务器 Prometheus 指标的端口。",
    )  # fmt: skip
    disable_metrics: bool = option(
        "--disable-metrics", "bool", False,
        "No server metrics; in a node that runs only a worker it stands for "
        "--disable-worker-metrics.",
        "不提供服务器指标；在只运行工作节点时等同于 --disable-worker-metrics。",
    )  # fmt: skip
    disable_worker: bool = option(
        "--disable-worker", "bool", False,
        "No built-in worker in the server node.",
        "服务器节点不运行内置的工作节点。",
    )  # fmt: skip
    bootstrap_password: Secret | None = option(
        "--bootstrap-password", "secret", None,
        "First password of user admin; a generated one is kept in "
        "<data-dir>/initial_admin_password and must be changed at first login.",
        "用户 admin 的初始密码；自动生成的密码保存在 <data-dir>/initial_admin_password，"
        "首次登录时必须修改。",
        shown_default=GENERATED,
    )  # fmt: skip
    database_url: Secret = option(
        "--database-url", "database", None,
        "SQLite, PostgreSQL 13+ (postgresql://user:password@host:port/db) or MySQL 8.0+ "
        "(mysql://user:password@host:port/db); embedded:// starts a PostgreSQL of its own below "
        "<data-dir>.",
        "SQLite、PostgreSQL 13+（postgresql://user:password@host:port/db）或 MySQL 8.0+"
        "（mysql://user:password@host:port/db）；embedded:// 在 <data-dir> 下启动自带的 "
        "PostgreSQL。",
        shown_default=Text(
            "sqlite:///<data-dir>/database.db", "sqlite:///<data-dir>/database.db"
        ),
    )  # fmt: skip
    ssl_keyfile: Path | None = option(
        "--ssl-keyfile", "path", None,
        "TLS private key; needs --ssl-certfile.",
        "TLS 私钥文件；需同时给出 --ssl-certfile。",
    )  # fmt: skip
    ssl_certfile: Path | None = option(
        "--ssl-certfile", "path", None,
        "TLS certificate, with its chain; needs --ssl-keyfile.",
        "TLS 证书文件，含证书链；需同时给出 --ssl-keyfile。",
    )  # fmt: skip
    force_auth_localhost: bool = option(
        "--force-auth-localhost", "bool", False,
        "Requests from the loopback address need credentials as well.",
        "来自回环地址的请求也需要凭据。",
    )  # fmt: skip
    disable_update_check: bool = option(
        "--disable-update-check", "bool", False,
        "Never look for a newer release.",
        "不检查新版本。",
    )  # fmt: skip
    disable_openapi_docs: bool = option(
        "--disable-openapi-docs", "bool", False,
        "No /docs, /redoc and /openapi.json.",
        "不提供 /docs、/redoc 和 /openapi.json。",
    )  # fmt: skip
    model_catalog_file: str | None = option(
        "--model-catalog-file", "str", None,
        "Path or URL of the model catalog.",
        "模型目录文件的路径或 URL。",
        shown_default=Text("built in", "内置"),
    )  # fmt: skip
    ray_port: int = option(
        "--ray-port", "port", 40096,
        "Ray GCS server.",
        "Ray（GCS 服务器）的端口。",
    )  # fmt: skip
    ray_client_server_port: int = option(
        "--ray-client-server-port", "port", 40097,
        "Ray client server.",
        "Ray 客户端服务器的端口。",
    )  # fmt: skip
    ray_dashboard_port: int = option(
        "--ray-dashboard-port", "port", 8265,
        "Ray dashboard.",
        "Ray 仪表盘的端口。",
    )  # fmt: skip
    enable_cors: bool = option(
        "--enable-cors", "bool", False,
        "Answer cross-origin requests.",
        "允许跨域请求。",
        aliases=("--enable_cors",), hot=True,
    )  # fmt: skip
    allow_credentials: bool = option(
        "--allow-credentials", "bool", False,
        "Cookies and credentials in cross-origin requests.",
        "允许跨域请求携带 Cookie 和凭据。",
        hot=True,
    )  # fmt: skip
    allow_origins: tuple[str, ...] = option(
        "--allow-origins", "origins", ("*",),
        "Origins allowed; repeatable.",
        "允许的来源；可重复。",
        hot=True,
    )  # fmt: skip
    allow_methods: tuple[str, ...] = option(
        "--allow-methods", "tokens", ("GET", "POST"),
        "Methods allowed in cross-origin requests; repeatable.",
        "跨域请求允许的方法；可重复。",
        hot=True,
    )  # fmt: skip
    allow_headers: tuple[str, ...] = option(
        "--allow-headers", "tokens", ("Authorization", "Content-Type"),
        "Request headers allowed in cross-origin requests; repeatable.",
        "跨域请求允许的请求头；可重复。",
        hot=True,
    )  # fmt: skip
    trusted_proxies: tuple[str, ...] = option(
        "--trusted-proxies", "networks", (),
        "Addresses or networks whose forwarding headers are believed; repeatable.",
        "其转发头可信的地址或网段；可重复。",
    )  # fmt: skip
    revoked_streams: str = option(
        "--revoked-streams", "str", "finish",
        "What becomes of an open request to a model whose API key is revoked or narrowed, or whose "
        "user is disabled.",
        "API 密钥被吊销或收窄、用户被禁用时，其正在进行的模型请求如何处理：完成或立即结束。",
        choices=("finish", "end"), hot=True,
    )  # fmt: skip
    unreachable_grace: float = option(
        "--unreachable-grace", "duration", 300.0,
        "How long a silent worker keeps its instances before they are replaced, "
        "such as 30s, 5m or 1h.",
        "工作节点失联后其实例保留多久才被替换，例如 30s、5m、1h。",
        shown_default=Text("5m", "5m"), hot=True,
    )  # fmt: skip
    server_external_url: str | None = option(
        "--server-external-url", "url", None,
        "URL under which workers outside reach this server; needed where workers are provisioned "
        "by a cloud provider.",
        "外部工作节点访问本服务器的 URL；由云厂商创建工作节点时需要。",
    )  # fmt: skip
    oidc_issuer: str | None = option(
        "--oidc-issuer", "url", None,
        "OpenID Connect issuer.",
        "OpenID Connect 颁发者的 URL。",
    )  # fmt: skip
    oidc_client_id: str | None = option(
        "--oidc-client-id", "str", None,
        "OpenID Connect client.",
        "OpenID Connect 客户端 ID。",
    )  # fmt: skip
    oidc_client_secret: Secret | None = option(
        "--oidc-client-secret", "secret", None,
        "OpenID Connect client secret.",
        "OpenID Connect 客户端密钥。",
    )  # fmt: skip
    oidc_redirect_uri: str | None = option(
        "--oidc-redirect-uri", "url", None,
        "Must be <server-url>/auth/oidc/callback; not needed with --server-external-url.",
        "必须为 <server-url>/auth/oidc/callback；给出 --server-external-url 时可省略。",
    )  # fmt: skip
    oidc_use_userinfo: bool = option(
        "--oidc-use-userinfo", "bool", False,
        "Read the user's attributes from the UserInfo endpoint instead of the ID token.",
        "从 UserInfo 端点而不是 ID 令牌读取用户属性。",
    )  # fmt: skip
    saml_idp_server_url: str | None = option(
        "--saml-idp-server-url", "url", None,
        "SAML identity provider's single sign-on URL.",
        "SAML 身份提供方的单点登录 URL。",
    )  # fmt: skip
    saml_idp_logout_url: str | None = option(
        "--saml-idp-logout-url", "url", None,
        "SAML identity provider's single logout URL (redirect binding); with it, a logout here "
        "is one there, and one there is one here.",
        "SAML 身份提供方的单点注销 URL（重定向绑定）；设置后，两边的注销互相生效。",
    )  # fmt: skip
    saml_idp_entity_id: str | None = option(
        "--saml-idp-entity-id", "str", None,
        "Identity provider's entity ID.",
        "身份提供方的实体 ID。",
    )  # fmt: skip
    saml_idp_x509_cert: str | None = option(
        "--saml-idp-x509-cert", "str", None,
        "Identity provider's signing certificate.",
        "身份提供方的签名证书。",
    )  # fmt: skip
    saml_sp_entity_id: str | None = option(
        "--saml-sp-entity-id", "str", None,
        "This service provider's entity ID.",
        "本服务提供方的实体 ID。",
    )  # fmt: skip
    saml_sp_acs_url: str | None = option(
        "--saml-sp-acs-url", "url", None,
        "Assertion consumer service; must be <server-url>/auth/saml/callback.",
        "断言消费者服务；必须为 <server-url>/auth/saml/callback。",
    )  # fmt: skip
    saml_sp_x509_cert: str | None = option(
        "--saml-sp-x509-cert", "str", None,
        "This service provider's certificate.",
        "本服务提供方的证书。",
    )  # fmt: skip
    saml_sp_private_key: Secret | None = option(
        "--saml-sp-private-key", "secret", None,
        "This service provider's private key.",
        "本服务提供方的私钥。",
    )  # fmt: skip
    saml_sp_attribute_prefix: str | None = option(
        "--saml-sp-attribute-prefix", "str", None,
        "Prefix of the attributes that --external-auth-* name.",
        "--external-auth-* 所指属性的前缀。",
    )  # fmt: skip
    saml_security: Json | None = option(
        "--saml-security", "json", None,
        'Security settings of SAML, e.g. {"wantAssertionsSigned": true, '
        '"wantMessagesSigned": true}.',
        'SAML 安全设置，例如 {"wantAssertionsSigned": true, "wantMessagesSigned": true}。',
        hidden=True,
    )  # fmt: skip
    external_auth_name: str | None = option(
        "--external-auth-name", "str", None,
        "Claim or attribute that becomes the user name, e.g. preferred_username.",
        "作为用户名的声明或属性，例如 preferred_username。",
    )  # fmt: skip
    external_auth_full_name: str | None = option(
        "--external-auth-full-name", "str", None,
        "Claim or attribute, or several joined with +, that becomes the full name, "
        "e.g. firstName+lastName.",
        "作为全名的声明或属性，可用 + 连接多个，例如 firstName+lastName。",
    )  # fmt: skip
    external_auth_avatar_url: str | None = option(
        "--external-auth-avatar-url", "str", None,
        "Claim or attribute that becomes the avatar URL.",
        "作为头像 URL 的声明或属性。",
    )  # fmt: skip
