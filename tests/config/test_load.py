"""Start options: one table, four origins, clear errors."""

from pathlib import Path

import pytest

from gpustack.config.load import from_json, load, to_json
from gpustack.config.options import Option, PortRange, options
from gpustack.errors import SettingsError


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
        ({"database_url": "mysql://u:hunter2@h/d"}, {}, ["--database-url", "'mysql'"]),
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
    ],
)
def test_an_error_names_the_option_its_origin_and_what_would_be_right(
    flags: dict[str, str], environment: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(SettingsError) as caught:
        load(flags, environment)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("known", list(options()), ids=lambda known: str(known.key))
def test_empty_text_is_no_value_but_an_empty_variable_is_none(known: Option) -> None:
    for empty in ("", "  "):
        with pytest.raises(SettingsError, match=r"^option --[a-z-]+: want .*empty"):
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
        ("prot: 80", ["unknown key prot", "did you mean port?"]),
        ("port: [1]", ["key port", "[1]"]),
        ("- a", ["`option: value`"]),
        ("a: b: c", ["not YAML", "1:5"]),
        ("token: hunter2\n  port: 1", ["not YAML", "2:7"]),
        ('token: "hunter2', ["not YAML"]),
        ("token: *hunter2", ["undefined alias", "1:8"]),
        ("token: !hunter2 x", ["not YAML", "1:8"]),
        ("token: hunter2\0", ["not YAML"]),
        ("token: 2024-13-13", ["not YAML"]),
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
    assert len(str(caught.value)) < 200 + len(str(file))


def test_every_flag_is_its_fields_name() -> None:
    assert all(known.flag == "--" + known.key.replace("_", "-") for known in options())
    assert len({known.flag for known in options()}) == len(list(options()))
