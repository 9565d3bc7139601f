"""Start options: one table, four origins, clear errors."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gpustack.config import checks, values
from gpustack.config import load as loading
from gpustack.config.load import from_json, to_json
from gpustack.config.options import Option, PortRange, Settings, options
from gpustack.config.values import setting_shown
from gpustack.errors import SettingsError


def load(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
    return loading.load(flags, environment).settings


def test_the_command_line_beats_the_environment_beats_the_file_beats_the_default(
    tmp_path: Path,
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("port: 1001\nworker_port: 1002\napi-port: 1003\n")
    environment = {"GPUSTACK_PORT": "2001", "GPUSTACK_WORKER_PORT": "2002"}
    got = load({"config_file": str(file), "port": "3001"}, environment)
    assert (got.port, got.worker_port, got.api_port, got.host) == (3001, 2002, 1003, "0.0.0.0")


def test_loading_touches_nothing(tmp_path: Path) -> None:
    got = load({"data_dir": str(tmp_path / "absent")}, {})
    assert got.log_dir == tmp_path / "absent" / "log"
    assert list(tmp_path.iterdir()) == []


def test_roles_get_the_same_settings_through_their_pipe(tmp_path: Path) -> None:
    given = {"data_dir": str(tmp_path), "token": "hunter2", "worker_labels": ["a=b"]}
    got = load(given, {"GPUSTACK_SYSTEM_RESERVED": '{"ram": 0.5}'})
    assert from_json(to_json(got)) == got
    assert got.system_reserved == (0.5, 1)
    assert got.service_port_range == PortRange(40000, 40063)


def test_secrets_are_never_printed(tmp_path: Path) -> None:
    got = load({"token": "hunter2", "bootstrap_password": "hunter3"}, {"HF_TOKEN": "hunter4"})
    assert "hunter" not in f"{got} {got!r} {got.token} {got.token!s:>10}"
    assert got.token is not None
    assert got.token.reveal() == "hunter2"


@pytest.mark.parametrize(
    ("flags", "environment", "words"),
    [
        ({"port": "0"}, {}, ["option --port", "1 to 65535", "'0'"]),
        ({}, {"GPUSTACK_PORT": "http"}, ["variable GPUSTACK_PORT", "'http'"]),
        ({"service_port_range": "9-8"}, {}, ["--service-port-range", "FIRST-LAST"]),
        ({"server_url": "server:80", "token": "t"}, {}, ["--server-url", "want a URL"]),
        ({"server_url": "http://server"}, {}, ["--token"]),
        ({"system_reserved": "2"}, {}, ["--system-reserved", '"ram"']),
        ({"worker_labels": ["x"]}, {}, ["--worker-labels", "key=value"]),
        ({"port": "8080"}, {}, ["--port", "--api-port", "both 8080"]),
        ({"worker_port": "40001"}, {}, ["--worker-port 40001", "--service-port-range"]),
        ({"database_url": "oracle://u:hunter2@h/d"}, {}, ["--database-url", "'oracle'"]),
        ({"database_url": "mysql://u:hunter2@h"}, {}, ["--database-url", "a host and a db"]),
        ({"database_url": "sqlite://x.db"}, {}, ["--database-url", "three slashes"]),
        ({"database_url": "hunter2"}, {}, ["--database-url", "sqlite:///PATH"]),
        ({"config_file": "/nowhere.yaml"}, {}, ["/nowhere.yaml"]),
        ({"config_file": "/bin/ls"}, {}, ["/bin/ls", "not YAML"]),
        ({"data_dir": "~nosuchuser/x"}, {}, ["--data-dir", "'~nosuchuser/x'"]),
        ({"system_reserved": '{"ram": 1e308}'}, {}, ["--system-reserved", "1000000"]),
        ({"system_reserved": '{"ram": Infinity}'}, {}, ["--system-reserved"]),
        ({"system_reserved": '{"vram": NaN}'}, {}, ["--system-reserved"]),
        ({"system_reserved": '{"vram": 1e12}'}, {}, ["--system-reserved"]),
        ({"worker_labels": "[" * 100_000}, {}, ["--worker-labels", "JSON list"]),
        ({"advertise_address": "foo bar"}, {}, ["--advertise-address", "IP address or a host"]),
        ({"host": "300.1.1.1"}, {}, ["--host", "IP address or a host"]),
        ({"server_url": "http://h:99999", "token": "t"}, {}, ["--server-url", "want a URL"]),
        ({"port": "\u00b2"}, {}, ["--port", "1 to 65535"]),
        ({"port": "1" * 5000}, {}, ["--port", "1 to 65535"]),
        ({"gateway_concurrency": "\u00b2"}, {}, ["--gateway-concurrency", "whole number"]),
        ({"worker_labels": ["x" * 5000]}, {}, ["--worker-labels", "key=value"]),
        ({"ssl_certfile": "/dev/null"}, {}, ["--ssl-certfile needs --ssl-keyfile"]),
        ({"server_fingerprint": "sha256:12"}, {}, ["--server-fingerprint", "64 hexadecimal"]),
        (
            {"server_ca": "/dev/null", "server_fingerprint": f"sha256:{'0a' * 32}"},
            {},
            ["--server-ca and --server-fingerprint: give one"],
        ),
        ({"server_ca": "/nowhere"}, {}, ["--server-ca: /nowhere is not there"]),
        ({"server_ca": "/etc/passwd"}, {}, ["--server-ca: /etc/passwd is no certificate"]),
        (
            {},
            {"GPUSTACK_SSL_KEYFILE": "/dev/null"},
            ["--ssl-keyfile (environment variable GPUSTACK_SSL_KEYFILE) needs --ssl-certfile"],
        ),
        (
            {"ssl_certfile": "/nowhere", "ssl_keyfile": "/dev/null"},
            {},
            ["--ssl-certfile: /nowhere is not there"],
        ),
        ({"ssl_certfile": "/etc", "ssl_keyfile": "/dev/null"}, {}, ["/etc is a directory"]),
        ({"data_dir": "/dev/null/x"}, {}, ["--data-dir: /dev/null is a file"]),
        ({"gateway_mode": "on"}, {}, ["--gateway-mode", "auto, embedded", "'on'"]),
        ({"metrics_port": "80"}, {}, ["--port (default) and --metrics-port are both 80"]),
        ({"worker_metrics_port": "10150"}, {}, ["--worker-metrics-port are both 10150"]),
        ({"rpc_server_port_range": "40063-40070"}, {}, ["40000-40063", "overlap"]),
        ({"distributed_worker_port_range": "100-200", "worker_port": "150"}, {}, ["150 lies in"]),
        (
            {"enable_ray": "1", "ray_port": "40098"},
            {},
            ["--ray-port", "--ray-node-manager-port (default) are both 40098"],
        ),
        ({"enable_ray": "1", "ray_worker_port_range": "40100-40131"}, {}, ["lies in"]),
        ({"oidc_issuer": "https://i"}, {}, ["--oidc-client-id and --oidc-client-secret and"]),
        (
            {"oidc_issuer": "https://i", "server_external_url": "https://g"},
            {},
            ["--oidc-issuer needs --oidc-client-id and --oidc-client-secret"],
        ),
        (
            {
                "oidc_issuer": "http://i",
                "oidc_client_id": "c",
                "oidc_client_secret": "s",
                "server_external_url": "https://g",
            },
            {},
            ["--oidc-issuer: want an https URL", "got http://i; http is for this machine"],
        ),
        ({"oidc_use_userinfo": "1"}, {}, ["--oidc-use-userinfo needs --oidc-issuer"]),
        ({"saml_idp_entity_id": "x"}, {}, ["--saml-idp-entity-id", "--saml-sp-acs-url"]),
        ({"saml_sp_private_key": "hunter2"}, {}, ["needs --saml-sp-x509-cert"]),
        ({"external_auth_name": "email"}, {}, ["--external-auth-name needs --oidc-issuer or"]),
        ({"saml_security": "[]"}, {}, ["--saml-security", "JSON object"]),
        ({"ray_args": ["--port=1 --verbose"]}, {}, ["--ray-args", "a shell would split"]),
        ({"ray_args": ["--num-cpus 4"]}, {}, ["--ray-args", "a shell would split"]),
        ({"allow_headers": ["X-\u4e2d"]}, {}, ["--allow-headers", "words such as"]),
        ({"allow_headers": ["X\r\nSet-Cookie: a=b"]}, {}, ["--allow-headers", "words such as"]),
        ({"allow_origins": ["b.example"]}, {}, ["--allow-origins", "https://app.example"]),
        ({"allow_origins": ["https://*.b"]}, {}, ["--allow-origins", "https://app.example"]),
        (
            {"enable_cors": "1", "allow_credentials": "1", "allow_origins": ["null"]},
            {},
            ["--allow-credentials needs --allow-origins that are named: with null"],
        ),
        ({"enable_cors": "1", "allow_credentials": "1"}, {}, ["named: with *"]),
        ({"server_url": "http://u:hunter2@h:99999", "token": "t"}, {}, ["http://h:99999"]),
        ({"database_url": ["postgresql://u:hunter2@h/d"]}, {}, ["--database-url: want sqlite"]),
        ({"database_url": "embedded://x"}, {}, ["nothing after it"]),
        ({"worker_name": "a\nb"}, {}, ["--worker-name", "one line"]),
        ({"server_url": "http://h/a b", "token": "t"}, {}, ["want a URL"]),
        ({"system_reserved": '{"ram": 1, "memory": 2}'}, {}, ["two names of one"]),
        ({"trusted_proxies": ["10.0.0.1/8"]}, {}, ["--trusted-proxies", "10.0.0.0/8"]),
        ({"unreachable_grace": "soon"}, {}, ["--unreachable-grace", "30s, 5m or 1h"]),
        ({"bootstrap_password": " "}, {}, ["--bootstrap-password", "not empty"]),
    ],
)
def test_an_error_names_the_option_its_origin_and_what_would_be_right(
    flags: dict[str, str], environment: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(SettingsError) as caught:
        load(flags, environment)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert max(map(len, str(caught.value).splitlines())) < 250


@pytest.mark.parametrize("known", list(options()), ids=lambda known: str(known.key))
def test_empty_text_is_no_value_but_an_empty_variable_is_none(known: Option) -> None:
    for empty in ("", "  "):
        with pytest.raises(SettingsError, match=r"^option --[a-z0-9-]+: want .*empty"):
            load({known.key: empty}, {})
    assert load({}, dict.fromkeys(known.environment, "")) == load({}, {})


@pytest.mark.parametrize(
    "host", ["10.0.0.1", "::1", "fe80::1%eth0", "localhost", "gpu-1.example.org", "node_7"]
)
def test_addresses_and_host_names_are_hosts(host: str) -> None:
    assert load({"advertise_address": host}, {}).advertise_address == host


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("prot: 80", ["line 1", "unknown key prot", "did you mean port?"]),
        ("port: [1]", ["key port", "[1]"]),
        ("- a", ["`option: value`"]),
        ("a", ["`option: value`"]),
        ("debug: true\n\nport: x", ["line 3, key port: want a port"]),
        ("port: 1\nPORT: 2", ["line 2: unknown key PORT", "did you mean"]),
        ("port: 1\nport: 2", ["line 2: key port is there twice", "line 1"]),
        ("resources: 4", ["key resources: want a JSON object"]),
        ("worker_labels: [a]", ["line 1, key worker_labels: want key=value"]),
        ("port: 1000\nhost: 1.2.3.4\napi_port: 1000", ["--port (config", "line 1, key port)"]),
        ("a: b: c", ["not YAML", "1:5"]),
        ("token: hunter2\n  port: 1", ["not YAML", "2:7"]),
        ('token: "hunter2', ["not YAML"]),
        ("token: *hunter2", ["undefined alias", "1:8"]),
        ("token: !hunter2 x", ["not YAML", "1:8"]),
        ("token: hunter2\0", ["not YAML"]),
        ("port: 80\nconfig_file: other.yaml", ["line 2", "names no other"]),
        ('ssl_certfile: "a\\0b"', ["key ssl_certfile: want a path"]),
        ("port: 0x50", ["line 1, key port"]),
        ("port:\nport: 2", ["line 2: key port is there twice"]),
        ("debug: ''", ["key debug", "empty"]),
        ("[" * 10_000, ["not YAML"]),
        ("port: " + "x" * 5000, ["key port"]),
        ("x" * 500 + ": 1", ["unknown key"]),
    ],
)
def test_an_error_in_the_file_names_the_file(
    tmp_path: Path, content: str, words: list[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(SettingsError) as caught:
        load({"config_file": str(file)}, {})
    assert all(word in str(caught.value) for word in (*words, str(file))), str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert len(str(caught.value)) < 200 + 2 * len(str(file))  # where two lines clash


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        load({"port": "x"}, {"GPUSTACK_HOST": "a b", "GPUSTACK_DEBUG": "maybe"})
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "environment variable GPUSTACK_DEBUG",
        "option --port",
        "environment variable GPUSTACK_HOST",
    ]


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        ({"unreachable_grace": "90"}, "unreachable_grace", 90.0),
        ({"unreachable_grace": "1.5m"}, "unreachable_grace", 90.0),
        ({"saml_security": '{"wantAssertionsSigned": true}'}, "saml_security",
         {"wantAssertionsSigned": True}),
        ({"rpc_server_args": ["cache /var/x"]}, "rpc_server_args", ("cache /var/x",)),
        ({"ray_args": ['--resources={"a": -1}']}, "ray_args", ('--resources={"a": -1}',)),
        ({"ray_args": ['--resources={"a": 1}']}, "ray_args", ('--resources={"a": 1}',)),
        ({"allow_origins": ["https://a", "https://b"]}, "allow_origins", ("https://a", "https://b")),
        ({"ray_worker_port_range": "40200-40999"}, "distributed_worker_port_range", (40200, 40999)),
        ({"database_url": "embedded://"}, "database_url", "embedded://"),
        ({"trusted_proxies": ["10.0.0.0/8", "::1"]}, "trusted_proxies", ("10.0.0.0/8", "::1")),
        ({"gateway_mode": "disabled", "api_port": "80"}, "api_port", 80),
        ({"disable_metrics": "1", "metrics_port": "80"}, "metrics_port", 80),
        ({"oidc_issuer": "https://i", "oidc_client_id": "c", "oidc_client_secret": "s",
          "oidc_redirect_uri": "https://h:8443/auth/oidc/callback"},
         "oidc_redirect_uri", "https://h:8443/auth/oidc/callback"),
    ],
)  # fmt: skip
def test_what_is_right_is_taken(flags: dict[str, Any], key: str, value: object) -> None:
    got = load(flags, {})
    assert getattr(got, key) == value
    assert from_json(json.loads(json.dumps(to_json(got)))) == got


@pytest.mark.parametrize("path", ["/auth/oidc", "/auth/saml/callback", "/x/auth/oidc/callback", ""])
def test_a_redirect_uri_with_another_path_is_refused(path: str) -> None:
    flags = {"oidc_issuer": "https://i", "oidc_client_id": "c", "oidc_client_secret": "hunter2"}
    with pytest.raises(SettingsError, match="want <server-url>/auth/oidc/callback") as caught:
        load({**flags, "oidc_redirect_uri": f"https://h{path}"}, {})
    assert "hunter2" not in str(caught.value)


def test_what_is_text_is_taken_as_it_is_written(tmp_path: Path) -> None:
    """YAML would make numbers of these, and other numbers than meant."""
    file = tmp_path / "c.yaml"
    file.write_text(
        "token: 0123456\nworker_name: 010\nhuggingface_token: 1.10\nbootstrap_password: 1:30\n"
        "image_repo: yes\nnamespace: 2024-01-01\nport: 0080\ndebug: yes\n"
    )
    got = load({"config_file": str(file)}, {})
    assert got.token is not None
    assert got.huggingface_token is not None
    assert got.bootstrap_password is not None
    assert got.token.reveal() == "0123456"
    assert got.huggingface_token.reveal() == "1.10"
    assert got.bootstrap_password.reveal() == "1:30"
    assert (got.worker_name, got.image_repo, got.namespace) == ("010", "yes", "2024-01-01")
    assert (got.port, got.debug) == (80, True)


def test_what_a_file_merges_gives_way_to_what_it_says(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("<<: {port: 8000, host: 127.0.0.1}\nport: 8001\n")
    got = load({"config_file": str(file)}, {})
    assert (got.port, got.host) == (8001, "127.0.0.1")


def test_every_mistake_of_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("prot: 80\nhots: 1\nport: x\n")
    with pytest.raises(SettingsError) as caught:
        load({"config_file": str(file)}, {})
    assert len(str(caught.value).splitlines()) == 3


def test_what_is_shown_of_settings_has_no_secret() -> None:
    flags = {
        "token": "hunter2", "database_url": "postgresql://u:hunter2@h/d",
        "tools_download_base_url": "http://u:hunter2@h/x", "server_url": "http://h",
        "saml_security": '{"spPrivateKey": "hunter2"}',
    }  # fmt: skip
    got = load(flags, {})
    shown = {known.key: setting_shown(known, getattr(got, known.key)) for known in options()}
    assert "hunter2" not in json.dumps(shown)
    assert shown["tools_download_base_url"] == "http://h/x"
    assert (shown["token"], shown["saml_security"]) == ("(hidden)", "(hidden)")
    assert shown["unreachable_grace"] == "5m"
    for seconds in (0.0, 1.5, 90.0, 3600.0, 86400.0):
        known = next(known for known in options() if known.kind == "duration")
        assert values.parse("duration", setting_shown(known, seconds)) == seconds


def test_lists_come_as_json_from_the_environment_and_as_lists_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "allow_methods: [PUT]\nworker_labels: {rack: 7}\nresources: {gpu_devices: []}\n"
    )
    got = load({"config_file": str(file)}, {"GPUSTACK_ALLOW_HEADERS": '["X-A", "X-B"]'})
    assert (got.allow_methods, got.allow_headers) == (("PUT",), ("X-A", "X-B"))
    assert got.labels == {"rack": "7"}
    assert got.resources == {"gpu_devices": []}


def test_older_names_work_and_say_what_is_newer() -> None:
    loaded = loading.load(
        {"worker_ip": "10.0.0.9", "system_reserved": '{"memory": 3, "gpu_memory": 4}'}, {}
    )
    assert loaded.settings.advertise_address == "10.0.0.9"
    assert loaded.settings.system_reserved == (3, 4)
    assert loaded.warnings == (
        "option --system-reserved: key memory is deprecated: write ram",
        "option --system-reserved: key gpu_memory is deprecated: write vram",
        "option --worker-ip: deprecated, use --advertise-address",
    )
    both = load({"worker_ip": "10.0.0.9", "advertise_address": "10.0.0.8"}, {})
    assert both.advertise_address == "10.0.0.8"


def test_a_worker_alone_takes_the_servers_names_of_its_metrics() -> None:
    worker = {"server_url": "http://s", "token": "t"}
    assert load({**worker, "metrics_port": "99"}, {}).worker_metrics_port == 99
    assert load({**worker, "disable_metrics": True}, {}).disable_worker_metrics
    both = load({**worker, "metrics_port": "99", "worker_metrics_port": "98"}, {})
    assert both.worker_metrics_port == 98
    server = load({"metrics_port": "99", "disable_metrics": True}, {})
    assert (server.metrics_port, server.worker_metrics_port) == (99, 10151)
    assert not server.disable_worker_metrics


def test_the_origin_of_each_value_is_known(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("# ours\nport: 1001\nhost: 127.0.0.1\n")
    loaded = loading.load(
        {"config_file": str(file), "debug": True}, {"HF_TOKEN": "t"}, {"host": "127.0.0.2"}
    )
    assert loaded.origins == {
        "config_file": "option --config-file",
        "port": f"config file {file}, line 2, key port",
        "host": "reload-config, key host",
        "debug": "option --debug",
        "huggingface_token": "environment variable HF_TOKEN",
    }
    assert loaded.settings.host == "127.0.0.2"


@pytest.fixture
def nobody() -> Iterator[Path]:
    """Inside, this process may do what a stranger may; a directory that strangers can see."""
    if not hasattr(os, "geteuid"):
        pytest.skip("needs POSIX permissions: run it on Linux or macOS")
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        (Path(place) / "key.pem").touch(mode=0o000)
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)
        else:
            Path(place).chmod(0o555)
        try:
            yield Path(place)
        finally:
            os.seteuid(before)
            Path(place).chmod(0o755)


def test_what_this_user_may_not_use_is_said_before_the_start(nobody: Path) -> None:
    key = nobody / "key.pem"
    with pytest.raises(SettingsError) as caught:
        load({"data_dir": str(nobody), "ssl_keyfile": str(key), "ssl_certfile": "/dev/null"}, {})
    first, second = str(caught.value).splitlines()
    assert first == f"--ssl-keyfile: {key} cannot be read"
    assert second.startswith(f"--data-dir: {nobody} is not writable for this user: give a ")


def test_every_flag_is_its_fields_name() -> None:
    assert all(known.flag == "--" + known.key.replace("_", "-") for known in options())
    assert len({known.flag for known in options()}) == len(list(options()))


OUTGOING = (range(32768, 61000), frozenset({8080, *range(40000, 40010)}))


def doubts(flags: Mapping[str, Any], outgoing: Any = OUTGOING) -> list[str]:
    loaded = loading.load(flags, {})
    return list(checks.doubtful(loaded.settings, loaded.origins, outgoing))


def test_ports_that_the_system_gives_to_others_are_named_with_the_way_out() -> None:
    (doubt,) = doubts({"worker_port": "40150"})
    assert doubt == (
        "--worker-port 40150 and --service-port-range (default) 40000-40063: this system gives "
        "ports 32768-60999 to outgoing connections, so one may be taken when it is needed. Keep "
        "them back: sysctl -w net.ipv4.ip_local_reserved_ports=8080,40000-40063,40150"
    )
    assert "--service-port-range 60990-61005:" in doubts({"service_port_range": "60990-61005"})[0]


@pytest.mark.parametrize(
    ("flags", "outgoing"),
    [
        ({"service_port_range": "20000-20063"}, OUTGOING),
        ({"service_port_range": "40000-40009"}, OUTGOING),  # kept back
        ({}, (range(32768, 61000), frozenset(range(40000, 40064)))),
        ({}, None),  # a system that does not say
        ({"disable_worker": True}, OUTGOING),
    ],
)
def test_ports_that_nobody_else_gets_are_not_doubted(
    flags: Mapping[str, Any], outgoing: Any
) -> None:
    assert doubts(flags, outgoing) == []
