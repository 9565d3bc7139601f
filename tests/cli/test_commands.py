"""The users' commands against a real node, without a login."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from demo import tiny_gguf
from gpustack import __version__
from tests.cli.conftest import Run, environment
from tests.support.node import Node


@pytest.fixture(scope="module")
def deployed(node: Node, model: Path) -> Path:
    """Model `tiny` runs."""
    node.deploy("tiny", model)
    return model


def test_a_model_is_deployed_used_and_deleted_without_a_login(run: Run, model: Path) -> None:
    done = run("models", "deploy", "short-lived", str(model), "--wait", "--env", "A=b=c")
    assert "is running" in done.stderr
    (listed,) = json.loads(run("models", "list", "--json").stdout)
    assert listed["name"] == "short-lived"
    assert listed["env"] == {"A": "b=c"}
    assert listed["local_path"] == str(model)
    answer = run("chat", "short-lived", "hello", "--max-tokens", "9").stdout
    assert len(answer.split()) == 9
    assert set(answer.split()) <= set(tiny_gguf.WORDS)
    run("models", "delete", "short-lived")
    assert "no model is called short-lived" in run("models", "delete", "short-lived", "x",
                                                   status=1).stderr  # fmt: skip


def test_lists_are_aligned_and_say_what_matters(run: Run, deployed: Path, node: Node) -> None:
    header, row = run("models", "list").stdout.splitlines()
    assert row[header.index("NAME") :].startswith("tiny ")
    assert row[header.index("READY") :].startswith("1/1 ")
    assert row[header.index("SOURCE") :].startswith(str(deployed))
    header, row = run("instances", "list").stdout.splitlines()
    assert row[header.index("STATE") :].startswith("running")
    header, row = run("workers", "list").stdout.splitlines()
    assert row[header.index("ADDRESS") :].split()[0].endswith(f":{node.worker_port}")
    assert row[header.index("STATE") :].startswith("ready")


def test_a_worker_is_labelled_and_what_it_registered_stays(run: Run, node: Node) -> None:
    (worker,) = json.loads(run("workers", "list", "--json").stdout)
    done = run("workers", "label", worker["name"], "zone=a=b", "rack=7")
    assert done.stderr.endswith("rack=7,zone=a=b\n")
    done = run("workers", "label", worker["name"], "zone=c", "rack-")
    assert done.stderr.endswith("os=linux,zone=c\n")
    assert ",zone=c" in run("workers", "list").stdout
    for change, why in (("rack-", "is not there"), ("os-", "own"), ("zone", "want KEY=VALUE")):
        assert why in run("workers", "label", worker["name"], change, status=1).stderr
    assert "no worker is called nobody" in run("workers", "label", "nobody", "a=b", status=1).stderr
    run("workers", "label", worker["name"], "zone-")


def test_a_worker_is_cordoned_drained_and_opened_again(
    run: Run, deployed: Path, node: Node
) -> None:
    with node.http() as http:
        name = http.get("/v2/workers").json()["items"][0]["name"]
    assert "takes no new instances" in run("workers", "cordon", name, "--reason", "new disk").stderr
    lost = run("workers", "drain", name, "--wait", "--timeout", "1s", status=1).stderr
    assert f"not within 1 s: 1 instance left on {name}: " in lost
    assert f"{name} is being drained: new disk" in lost
    header, row = run("workers", "list").stdout.splitlines()
    assert row[header.index("SCHEDULING") :].startswith("draining, 1 left ")
    assert row.endswith(" new disk")
    assert "takes new instances" in run("workers", "uncordon", name).stderr
    alone = run("workers", "drain", name, "--timeout", "1s", status=1).stderr
    assert "--timeout is for --wait" in alone


@pytest.mark.slow  # many commands, each with its start
def test_a_model_is_granted_to_users_and_groups(run: Run, deployed: Path, node: Node) -> None:
    with node.http() as http:
        for name in ("ann", "bob"):
            assert http.post("/v2/users", json={"username": name}).status_code == 201
    run("groups", "create", "team", "--description", "d")
    run("groups", "add", "team", "ann", "bob")
    run("groups", "remove", "team", "bob")
    (member,) = json.loads(run("groups", "members", "team", "--json").stdout)
    assert member["username"] == "ann"
    header, row = run("groups", "list").stdout.splitlines()
    assert row[header.index("MEMBERS") :].startswith("1 ")
    for words, said in (
        ((), "every user"),
        (("--nobody",), "administrators alone"),
        (("--user", "bob", "--group", "team"), "user bob\ngroup team"),
        ((), "user bob\ngroup team"),
        (("--all-users",), "every user"),
    ):
        assert run("models", "access", "tiny", *words).stdout == f"{said}\n"
    wrong = run("models", "access", "tiny", "--nobody", "--user", "bob", status=1).stderr
    assert "give one of" in wrong
    assert "no user is called eve" in run("groups", "add", "team", "eve", status=1).stderr
    run("groups", "delete", "team")
    assert "no group is called team" in run("groups", "members", "team", status=1).stderr


def test_an_engines_log_is_printed_by_name_or_id(run: Run, deployed: Path) -> None:
    (instance,) = json.loads(run("instances", "list", "--json").stdout)
    for word in (instance["name"], str(instance["id"])):
        lines = run("instances", "logs", word, "--tail", "3").stdout.splitlines()
        assert len(lines) == 3
    assert "no instance is called nobody" in run("instances", "logs", "nobody", status=1).stderr


def test_the_log_of_an_earlier_run_is_kept_in_a_file(
    run: Run, node: Node, deployed: Path, tmp_path: Path
) -> None:
    (instance,) = json.loads(run("instances", "list", "--json").stdout)
    log, kept = node.log_dir / "serve" / f"{instance['id']}.log", tmp_path / "kept.log"
    said = b"\x1b[31mold\x1b[0m\n\xff\n" * 1000
    log.with_name(log.name + ".1").write_bytes(said)
    run("instances", "logs", instance["model_name"], "-p", "-o", str(kept))
    assert kept.read_bytes() == said
    words = ("-ppp", "--since", "20d", "-o", str(kept))
    refused = run("instances", "logs", instance["name"], *words, status=1).stderr
    assert "has no log of 3 runs before on this worker: 1 earlier" in refused
    assert kept.read_bytes() == said


def test_a_followed_log_ends_with_ctrl_c_and_status_130(node: Node, deployed: Path) -> None:

    words = ["instances", "logs", _instance(node), "-f"]
    with subprocess.Popen(
        [sys.executable, "-m", "gpustack", *words],
        env=environment(node.data_dir), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline()  # it is connected
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert b"Traceback" not in process.stderr.read()


def _instance(node: Node) -> str:
    with node.http() as http:
        return str(http.get("/v2/model-instances").json()["items"][0]["name"])


def test_a_conversation_remembers_until_it_is_told_to_forget(run: Run, deployed: Path) -> None:
    lines = [r"\h", "hello", "world", r"\c", "hello", r"\q", "never"]
    exactly = ("--max-tokens", "20", "--temperature", "0")
    done = run("chat", "tiny", *exactly, stdin="\n".join(lines) + "\n")
    first, second, third = (part for part in done.stdout.split(">>> ") if part)
    assert first == third  # forgotten: the same question alone
    assert second != first
    assert done.stderr.count("forgets") == 2


def test_a_key_opens_the_gateway_at_once(run: Run, deployed: Path, node: Node) -> None:
    key = run("api-keys", "create", "mine", "--expires-in", "1h").stdout.strip()
    assert key.startswith("gpustack_")
    elsewhere = {"GPUSTACK_DATA_DIR": "/nonexistent", "GPUSTACK_API_KEY": key}
    assert run("chat", "tiny", "hi", "--server-url", node.url, **elsewhere).stdout.strip()
    wrong = {"GPUSTACK_DATA_DIR": "/nonexistent", "GPUSTACK_API_KEY": "gpustack_wrong"}
    assert run("models", "list", "--server-url", node.url, status=1, **wrong).stderr.startswith(
        "Error: "
    )


def test_a_broken_model_ends_waiting_with_the_engines_words(run: Run, tmp_path: Path) -> None:
    broken = tiny_gguf.write_broken(tmp_path / "broken.gguf")
    done = run("models", "deploy", "broken", str(broken), "--wait", status=1)
    assert "not within the file bounds" in done.stderr.splitlines()[-1]
    run("models", "delete", "broken")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["chat", "none", "hi"], "none"),
        (["models", "deploy", "m"], "say which model"),
        (["models", "deploy", "m", "/a.gguf", "--local-path", "/b.gguf"], "not both"),
        (["models", "deploy", "m", "one/two/three"], "want /a/path.gguf or org/repo[:file]"),
        (["models", "deploy", "bad name", "/a.gguf"], "name: "),
        (["models", "deploy", "m", "a" * 300], "want /a/path.gguf or org/repo[:file]"),
        (["models", "deploy", "m", "~nobody-at-all/a.gguf"], "nobody here is called so"),
        (["api-keys", "create", ""], "name: "),
        (["models", "list", "--api-key", "é"], "letters beyond ASCII"),
        (["models", "list", "--server-url", "http://[::1"], "want a URL"),
        (["models", "list", "--server-url", "http://a:99999"], "want a URL"),
        (["models", "list", "--server-url", "http://é..com"], "Invalid"),
        (["models", "deploy", "m", "/a.gguf", "--env", "A"], "want NAME=VALUE"),
        (["api-keys", "create", "k", "--expires-in", "soon"], "want a duration"),
        (["models", "list", "--server-url", "nonsense"], "want a URL"),
        (["models", "list", "--server-url", "http://127.0.0.1:9"], "no answer from the server"),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_status_1(
    words: list[str], sentence: str, run: Run
) -> None:
    done = run(*words, status=1)
    assert sentence in done.stderr
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_where_no_node_is_the_data_directory_is_named(run: Run, tmp_path: Path) -> None:
    """The default port is nothing that the user has said."""
    for words in (("models", "list"), ("export",), ("models", "rollback", "m")):
        said = run(*words, status=1, GPUSTACK_DATA_DIR=str(tmp_path)).stderr
        assert said.startswith("Error: no answer from the server at http://127.0.0.1:80: ")
        assert said.endswith(
            f"; no node runs on data directory {tmp_path}: give --data-dir or --server-url\n"
        )


def test_the_local_credential_never_leaves_this_machine(tmp_path: Path) -> None:
    from gpustack.cli.connection import connection

    (tmp_path / "local_admin").write_text("secret")
    here = connection("http://localhost:8000", None, tmp_path)
    assert here.token is not None
    assert here.token.reveal() == "secret"
    assert connection("http://gpu.example.com", None, tmp_path).token is None
    given = connection("http://gpu.example.com", "given", tmp_path)
    assert given.token is not None
    assert given.token.reveal() == "given"


def test_a_reader_that_goes_away_is_no_traceback(node: Node, deployed: Path) -> None:
    # `true` has ended long before anything is written.
    script = f"{sys.executable} -m gpustack models list --json | true"
    done = subprocess.run(
        ["/bin/sh", "-c", script], env=environment(node.data_dir), capture_output=True,
        timeout=30, check=True,
    )  # fmt: skip
    assert done.stderr == b""


def test_an_output_that_takes_nothing_is_one_sentence(node: Node, deployed: Path) -> None:
    for words in (["models", "list"], ["chat", "tiny", "hi", "--max-tokens", "3"]):
        with Path("/dev/full").open("wb") as full:
            done = subprocess.run(
                [sys.executable, "-m", "gpustack", *words],
                env=environment(node.data_dir), stdout=full, stderr=subprocess.PIPE, timeout=30,
                check=False,
            )  # fmt: skip
        assert done.stderr == b"Error: No space left on device\n"
        assert done.returncode == 1


def test_words_beyond_ascii_work_in_a_locale_of_ascii(
    run: Run, deployed: Path, tmp_path: Path
) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0"}
    assert run("chat", "tiny", "hé", "--max-tokens", "3", **ascii_only).stdout.strip()
    talk = run("chat", "tiny", "--max-tokens", "3", stdin="hé\n", **ascii_only)
    assert talk.stdout.strip(" >\n")
    assert "Error" not in talk.stderr
    path = tmp_path / "modèle.gguf"
    path.write_bytes(deployed.read_bytes())
    run("models", "deploy", "accented", str(path), "--wait", **ascii_only)
    assert str(path) in run("models", "list", **ascii_only).stdout
    run("models", "delete", "accented")


def test_the_version_needs_no_node(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpustack", "version"]
    for words, want in ((["--short"], f"{__version__}\n"), ([], f"gpustack {__version__} (Python")):
        done = subprocess.run(
            [*command, *words], capture_output=True, text=True, check=True, timeout=20
        )
        assert done.stdout.startswith(want)


def test_help_imports_no_command(tmp_path: Path) -> None:
    code = (
        "import sys; from gpustack.cli.app import main\n"
        "try: main(['--help'])\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False,
        env=dict(os.environ),
    )  # fmt: skip
    assert "chat" in done.stdout
    loaded = set(done.stderr.split())
    assert not {"gpustack.cli.models", "gpustack.cli.start", "httpx", "pydantic"} & loaded


def test_every_command_that_help_names_exists() -> None:
    import click

    from gpustack.cli.app import COMMANDS, main

    context = click.Context(main)
    for name in COMMANDS:
        command = main.get_command(context, name)
        assert command is not None
        assert command.help
