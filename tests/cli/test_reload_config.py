"""What a running node can take in, and how it is asked."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpustack.cli.reload_config import Answer, request, taken_in
from gpustack.config.load import from_json, hot_json, load, to_json, with_hot
from gpustack.errors import SettingsError
from tests.cli.conftest import Run, environment
from tests.support.node import Node
from tests.support.wait import soon


def test_what_can_change_does_and_the_rest_is_named() -> None:
    old = load({}, {}).settings
    new = load({"debug": True, "worker_labels": ["a=b"], "port": "81", "token": "t"}, {}).settings
    now, said = taken_in(old, new)
    assert said == Answer(changed=["debug", "worker_labels"], waiting=["token", "port"])
    assert (now.debug, now.labels, now.port, now.token) == (True, {"a": "b"}, 80, None)
    assert taken_in(now, now) == (now, Answer())


def test_roles_are_told_what_may_change_and_no_secret() -> None:
    old = load({"token": "hunter2", "huggingface_token": "hunter3"}, {}).settings
    new = load({"enable_cors": True, "system_reserved": '{"ram": 5}'}, {}).settings
    told = json.dumps(hot_json(new))
    assert "hunter" not in json.dumps(hot_json(old))
    now = with_hot(old, json.loads(told))
    assert (now.enable_cors, now.system_reserved, now.token) == (True, (5, 1), "hunter2")
    assert from_json(to_json(now)) == now


def test_a_request_is_taken_once_and_nonsense_is_said(tmp_path: Path) -> None:
    assert request(tmp_path) == ("", {})
    (tmp_path / "reload.json").write_text('{"id": "x", "set": {"debug": "1"}}')
    assert request(tmp_path) == ("x", {"debug": "1"})
    assert request(tmp_path) == ("", {})
    for nonsense in (b"", b"[]", b"{}", b'{"id": 1, "set": 2}', b"\xff"):
        (tmp_path / "reload.json").write_bytes(nonsense)
        with pytest.raises(SettingsError, match="not what `gpustack reload-config` writes"):
            request(tmp_path)
        assert request(tmp_path) == ("", {})  # it spoils no later signal


def asking(node: Node, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "gpustack", "reload-config", *words],
        env=environment(node.data_dir),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_each_of_those_who_ask_at_once_is_answered(node: Node) -> None:
    values = {
        "debug": "true", "enable_cors": "true", "allow_methods": '["GET"]',
        "worker_labels": '["a=b"]',
    }  # fmt: skip
    asked = {key: asking(node, "--set", f"{key}={value}") for key, value in values.items()}
    said = {key: one.communicate(timeout=60) for key, one in asked.items()}
    assert said == {key: (f"in effect: {key}\n", "") for key in values}


def test_what_was_set_can_be_dropped(node: Node, run: Run) -> None:
    run("reload-config", "--unset", "worker-labels")  # that nothing was set is no mistake
    assert (
        run("reload-config", "--set", 'worker_labels=["c=d"]').stdout
        == "in effect: worker_labels\n"
    )
    assert run("reload-config").stdout == "in effect: nothing new\n"
    dropped = run("reload-config", "--unset", "worker-labels")
    assert dropped.stdout == "in effect: worker_labels\n"
    both = run("reload-config", "--set", "debug=1", "--unset", "debug", status=1)
    assert both.stderr == "Error: --unset: debug is in --set as well\n"
    cold = run("reload-config", "--unset", "port", status=1)
    assert cold.stderr.startswith("Error: --unset: port needs a restart")


def test_a_request_that_is_given_up_is_withdrawn(node: Node, run: Run) -> None:
    run("reload-config", "--set", 'worker_labels=["e=f"]')
    pid = node.said()["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        asked = asking(node, "--set", 'worker_labels=["g=h"]')
        soon((node.data_dir / "reload.json").exists, "it has asked")
        asked.send_signal(signal.SIGINT)
        asked.communicate(timeout=30)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert asked.returncode == 130
    assert not (node.data_dir / "reload.json").exists()
    assert (
        run("reload-config", "--set", 'worker_labels=["e=f"]').stdout == "in effect: nothing new\n"
    )
