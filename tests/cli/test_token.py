"""`gpustack token`: how machines join a real node."""

import json
import shlex
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.support.node import Node
from tests.support.wait import soon

#: Answers a node that has started with the words of a join command.
Join = Callable[[str, list[str]], Node]


@pytest.fixture
def join(node: Node, tmp_path: Path) -> Iterator[Join]:
    made: list[Node] = []

    def join(name: str, words: list[str]) -> Node:
        worker = Node(tmp_path / name, server=node)
        at = worker.arguments.index("--token")
        worker.arguments[at : at + 2] = []
        at = worker.arguments.index("--server-url")
        worker.arguments[at : at + 2] = words
        made.append(worker)
        return worker.start(wait=False)

    yield join
    for worker in made:
        worker.kill()


def command(run: Run, *words: str) -> list[str]:
    """The options of the command that `gpustack token create` prints."""
    (line,) = run("token", "create", *words).stdout.splitlines()
    gpustack, start, *options = shlex.split(line)
    assert (gpustack, start, options[0], options[2]) == (
        "gpustack", "start", "--server-url", "--token",
    )  # fmt: skip
    assert options[3].startswith("gpustack_join_")
    return options


def ready(run: Run, name: str) -> bool:
    found = json.loads(run("workers", "list", "--json").stdout)
    return any((one["name"], one["state"]) == (name, "ready") for one in found)


def test_a_machine_joins_with_the_command_that_is_printed_and_a_second_does_not(
    node: Node, run: Run, join: Join
) -> None:
    words = command(run, "--url", node.url, "--description", "räck 3")
    assert words[1] == node.url
    join("first", words)
    soon(lambda: ready(run, "first"), "the first is ready", within_s=60)
    second = join("second", words)
    said = "this join token was for one worker, and first has used it"
    soon(lambda: said in second.log.read_text(), "the second is told", within_s=60)
    listed = run("token", "list").stdout.splitlines()
    assert any("one" in line and "worker" in line and "räck 3" in line for line in listed[1:])
    assert words[3] not in "".join(listed)


def test_the_clusters_token_is_rotated_and_who_has_joined_goes_on(node: Node, run: Run) -> None:
    path = node.data_dir / "token"
    old = path.read_text().strip()
    done = run("token", "rotate")
    new = done.stdout.strip()
    assert (new != old, path.read_text().strip()) == (True, new)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert done.stderr == ""
    for token, status in ((old, 401), (new, 422)):  # 422: the token will do, `{}` is no machine
        with node.http(token) as http:
            assert http.post("/v2/workers/register", json={}).status_code == status
    own = json.loads(run("workers", "list", "--json").stdout)[0]["name"]
    assert ready(run, own)
    log = json.loads(run("audit", "list", "--json").stdout)
    (entry,) = [one for one in log if one["kind"] == "cluster"]
    assert (entry["username"], entry["changed"]["token"]["after"]) == ("admin", "********")


def test_elsewhere_an_administrators_key_makes_and_rotates_tokens(
    node: Node, run: Run, tmp_path: Path
) -> None:
    key = run("api-keys", "create", "tokens").stdout.strip()
    elsewhere = {"GPUSTACK_DATA_DIR": str(tmp_path), "GPUSTACK_API_KEY": key}
    rotated = run("token", "rotate", "--server-url", node.url, **elsewhere).stdout.strip()
    assert (node.data_dir / "token").read_text().strip() == rotated
    made = run("token", "create", "--server-url", node.url, "--expires-in", "1h", **elsewhere)
    assert made.stdout.startswith("gpustack start --server-url http://")
    assert f":{node.port} --token gpustack_join_" in made.stdout
    assert "for one worker, until " in made.stderr


def test_tokens_are_deleted_by_their_id(run: Run) -> None:
    command(run, "--reusable")
    newest = json.loads(run("token", "list", "--json").stdout)[-1]
    assert newest["reusable"]
    run("token", "delete", str(newest["id"]))
    left = json.loads(run("token", "list", "--json").stdout)
    assert newest["id"] not in [one["id"] for one in left]
    gone = run("token", "delete", str(newest["id"]), status=1)
    assert f"there is no join token with id {newest['id']}" in gone.stderr


def test_a_url_that_only_this_machine_knows_is_said_to_be_one(run: Run) -> None:
    made = run("token", "create", "--url", "http://127.0.0.1:8000")
    assert "other machines do not reach http://127.0.0.1:8000: give --url" in made.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["create", "--expires-in", "soon"], "--expires-in: want a duration"),
        (["create", "--expires-in", "2000d"], "expires_in: "),
        (["create", "--url", "server:80"], "--url: want a URL"),
    ],
)
def test_mistakes_are_named(run: Run, words: list[str], said: str) -> None:
    assert said in run("token", *words, status=1).stderr


def test_a_node_that_was_given_its_token_says_that_a_start_brings_it_back(
    tmp_path: Path, run: Run
) -> None:
    given = Node(tmp_path / "given", "--disable-worker", "--token", "from-the-options").start()
    try:
        done = run("token", "rotate", GPUSTACK_DATA_DIR=str(given.data_dir))
        assert "its next start makes that one the cluster's again" in done.stderr
        with given.http("from-the-options") as http:
            assert http.post("/v2/workers/register", json={}).status_code == 401
    finally:
        given.kill()
