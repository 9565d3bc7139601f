"""Deploy, fail, scale, delete: what an administrator sees."""

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gpustack.lib.net import can_bind
from tests.support.node import Node
from tests.support.wait import soon


@pytest.fixture(scope="module")
def key(node: Node) -> str:
    return node.api_key()


def ask(node: Node, key: str, model: str) -> None:
    api = openai.OpenAI(base_url=f"{node.url}/v1", api_key=key, max_retries=0)
    answer = api.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=2
    )
    assert answer.choices


def records(node: Node) -> dict[int, str]:
    """Instance id -> uid of the engine records on disk."""
    paths = (node.data_dir / "engines").glob("*.json")
    return {json.loads(path.read_text())["instance_id"]: path.stem for path in paths}


def tokens_made(node: Node, one: dict[str, Any]) -> int:
    """What the engine itself counted, from its metrics."""
    uid = records(node)[one["id"]]
    secret = (node.data_dir / "engines" / f"{uid}.key").read_text().strip()
    answer = httpx.get(
        f"http://127.0.0.1:{one['port']}/metrics",
        headers={"Authorization": f"Bearer {secret}"},
        trust_env=False,
    )
    for line in answer.text.splitlines():
        if line.startswith("llamacpp:tokens_predicted_total"):
            return int(float(line.split()[-1]))
    raise AssertionError(answer.text)


def test_two_instances_share_the_work_and_the_death_of_one_loses_no_request(
    node: Node, models: Path, key: str
) -> None:
    model_id = node.deploy("pair", models / "chat.gguf", replicas=2)
    for _ in range(20):
        ask(node, key, "pair")
    both = node.instances(model_id)
    assert all(tokens_made(node, one) > 0 for one in both)

    victim = both[0]
    os.kill(victim["pid"], signal.SIGKILL)
    for _ in range(50):
        ask(node, key, "pair")

    def back() -> bool:
        found = {one["id"]: one for one in node.instances(model_id)}
        now = found[victim["id"]]
        return bool(now["state"] == "running" and now["pid"] != victim["pid"])

    soon(back, "the killed instance comes back by itself", within_s=30)
    assert Counter(one["restart_count"] for one in node.instances(model_id)) == {0: 1, 1: 1}


def test_a_broken_file_is_an_error_with_the_engines_last_words_and_no_storm(
    node: Node, models: Path
) -> None:
    model_id = node.deploy("broken", models / "broken.gguf", wait="error")
    (one,) = node.instances(model_id)
    assert "failed to load model" in one["state_message"].lower() or (
        "gguf" in one["state_message"].lower()
    )
    assert "Traceback" not in one["state_message"]
    assert one["restart_count"] == 0
    # The next try is 10 s away: what starts meanwhile is a storm.
    log = node.log_dir / "serve" / f"{one['id']}.log"
    written = log.stat().st_mtime_ns
    for _ in range(50):
        assert node.instances(model_id)[0]["restart_count"] == 0
    assert log.stat().st_mtime_ns == written
    with node.http() as http:
        assert http.delete(f"/v2/models/{model_id}").status_code == 202
        soon(lambda: http.get(f"/v2/models/{model_id}").status_code == 404, "the model is gone")


def test_deleting_a_model_stops_its_engines_and_frees_port_claim_and_name(
    node: Node, models: Path
) -> None:
    before = set(node.engine_pids())
    model_id = node.deploy("brief", models / "chat.gguf")
    (one,) = node.instances(model_id)
    assert one["claim"]["ram_bytes"] > 0
    assert not can_bind("127.0.0.1", one["port"])
    with node.http() as http:
        assert http.delete(f"/v2/models/{model_id}").status_code == 202
        soon(lambda: http.get(f"/v2/models/{model_id}").status_code == 404, "the model is gone")
        assert http.get(f"/v2/model-instances/{one['id']}").status_code == 404
    assert set(node.engine_pids()) == before
    assert can_bind("127.0.0.1", one["port"])
    assert one["id"] not in records(node)
    again = node.deploy("brief", models / "chat.gguf")
    with node.http() as http:
        http.delete(f"/v2/models/{again}")


def test_the_engines_log_is_shown_and_holds_no_secret(node: Node, models: Path) -> None:
    model_id = node.deploy("talkative", models / "chat.gguf")
    (one,) = node.instances(model_id)
    with node.http() as http:
        answer = http.get(f"/v2/model-instances/{one['id']}/logs", params={"tail": 1000})
    assert answer.status_code == 200, answer.text
    assert answer.text
    secrets = [path.read_text().strip() for path in (node.data_dir / "engines").glob("*.key")]
    assert secrets
    everything = node.log.read_text() + answer.text
    for pid in (*node.pids(), *node.engine_pids()):
        everything += Path(f"/proc/{pid}/cmdline").read_text()
    names = ("local_admin", "gateway_credential", "token", "initial_admin_password")
    secrets += [(node.data_dir / name).read_text().strip() for name in names]
    assert not [secret for secret in secrets if secret in everything]


def test_a_model_that_fits_nowhere_waits_and_says_why(node: Node, models: Path) -> None:
    model_id = node.deploy(
        "huge",
        models / "chat.gguf",
        wait="pending",
        backend_parameters=["--ctx-size=900000000"],
    )
    soon(lambda: node.instances(model_id)[0]["reasons"], "it has reasons")
    (reason,) = node.instances(model_id)[0]["reasons"]
    assert reason["code"] == "ram"
    assert "needed" in reason["message"]
    with node.http() as http:
        http.delete(f"/v2/models/{model_id}")
