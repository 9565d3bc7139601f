"""Log levels of a running node's parts, each for itself."""

import subprocess
import sys

import httpx

from tests.support.node import Node
from tests.support.wait import soon


def test_server_and_worker_change_their_levels_each_for_itself(node: Node) -> None:
    with node.http() as http:
        (worker,) = http.get("/v2/workers").json()["items"]
        of_worker = f"/v2/workers/{worker['id']}/log-level"
        assert http.get("/debug/log_level").text == "INFO"
        assert http.put(of_worker, content="DEBUG").text == "DEBUG"
        assert http.get(of_worker).text == "DEBUG"
        assert http.get("/debug/log_level").text == "INFO"
        assert " I agent gpustack.lib.log_level: log level is now DEBUG" in node.log.read_text()
        assert http.put("/debug/log_level", content="ERROR").text == "ERROR"
        assert http.get(of_worker).text == "DEBUG"


def reload(node: Node, setting: str) -> str:
    command = [sys.executable, "-m", "gpustack", "reload-config", "--data-dir", str(node.data_dir)]
    return subprocess.check_output([*command, "--set", setting], text=True, timeout=60)


def test_a_chosen_level_lasts_until_debug_itself_changes(node: Node) -> None:
    with node.http() as http:
        (worker,) = http.get("/v2/workers").json()["items"]
        places = ("/debug/log_level", f"/v2/workers/{worker['id']}/log-level")
        for place in places:
            assert http.put(place, content="WARNING").text == "WARNING"
        assert reload(node, 'worker_labels=["seen=yes"]') == "in effect: worker_labels\n"
        soon(lambda: is_labelled(http), "the worker has taken the new settings in")
        assert [http.get(place).text for place in places] == ["WARNING", "WARNING"]
        assert reload(node, "debug=true") == "in effect: debug\n"
        for place in places:
            soon(lambda place=place: http.get(place).text == "DEBUG", "both")  # type: ignore[misc]


def is_labelled(http: httpx.Client) -> bool:
    (worker,) = http.get("/v2/workers").json()["items"]
    return bool(worker["labels"].get("seen") == "yes")
