"""`gpustack apply`, `diff`, `export`, and going back, against a real node."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Run
from tests.support.node import Node
from tests.support.wait import soon

ONE = """\
models:
- name: one
  source: local_path
  local_path: /models/one.gguf
  replicas: 0
"""
TWO = ONE + "- {name: two, source: local_path, local_path: /models/two.gguf, replicas: 0}\n"


@pytest.fixture
def file(node: Node, run: Run, tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "cluster.yaml"
    (tmp_path / "none.yaml").write_text("models: []\n")
    run("apply", "-f", str(tmp_path / "none.yaml"), "--prune", "--yes")
    soon(lambda: json.loads(run("models", "list", "--json").stdout) == [], "the cluster is empty")


def test_a_file_is_shown_applied_and_exported(run: Run, file: Path) -> None:
    file.write_text(TWO)
    shown = run("diff", "-f", str(file)).stdout
    assert "+ model one\n" in shown
    assert '    local_path: "/models/one.gguf"\n' in shown
    assert run("diff", "-f", str(file), "--exit-code", status=3).stdout == shown
    assert json.loads(run("models", "list", "--json").stdout) == []
    done = run("apply", "-f", str(file), "--yes")
    assert (done.stdout, done.stderr) == (shown, "2 changes done\n")
    again = run("apply", "-f", str(file))
    assert (again.stdout, again.stderr) == ("", "nothing to change\n")

    exported = file.with_name("exported.yaml")
    assert run("export", str(exported)).stderr == f"wrote {exported}\n"
    assert exported.stat().st_mode & 0o777 == 0o600
    assert run("export").stdout == exported.read_text()
    assert yaml.safe_load(exported.read_text()) == yaml.safe_load(TWO)
    assert run("diff", "-f", str(exported), "--prune", "--exit-code").stdout == ""


def test_an_export_goes_where_it_is_told_to_and_leaves_nothing_else(run: Run, file: Path) -> None:
    text = run("export").stdout
    target, link, pipe = (file.with_name(name) for name in ("target", "link", "pipe"))
    target.write_text("old")
    link.symlink_to(target)
    run("export", str(link))
    assert link.is_symlink()
    assert target.read_text() == text
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True) as reader:
        run("export", str(pipe))
        assert reader.communicate(timeout=10)[0] == text
    assert pipe.is_fifo()
    none = file.with_name("none") / "sub" / "f"
    said = run("export", str(none), status=1).stderr
    assert said == f"Error: {none.parent}: No such file or directory\n"
    assert not none.parent.parent.exists()
    assert (
        f"File '{file.parent}' is a directory" in run("export", str(file.parent), status=2).stderr
    )


def test_nobody_can_be_asked_through_a_pipe_and_nothing_goes_that_is_not_named(
    run: Run, file: Path
) -> None:
    file.write_text(TWO)
    refused = run("apply", "-f", str(file), status=1)
    assert "say --yes" in refused.stderr
    run("apply", "-f", "-", "--yes", stdin=TWO)
    changed = ONE.replace("replicas: 0", "replicas: 0\n  description: täglich")
    done = run("apply", "-f", "-", "--yes", stdin=changed)
    assert done.stdout == '~ model one\n    description: null -> "täglich"\n'
    assert run("diff", "-f", "-", "--prune", stdin=changed).stdout == "- model two\n"
    run("apply", "-f", "-", "--prune", "--yes", stdin=changed)
    assert [m["name"] for m in json.loads(run("models", "list", "--json").stdout)] == ["one"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ONE + "routes: []\n", ":6: routes cannot be applied yet"),
        (TWO.replace("two.gguf", "two.txt"), ":6: model two: no backend runs /models/two.txt"),
        (TWO.replace("replicas: 0}", "replicas: x}"), ":6: model two: replicas: Input should be"),
    ],
)
def test_mistakes_are_named_with_file_and_line(run: Run, file: Path, text: str, said: str) -> None:
    file.write_text(text)
    for command in ("apply", "diff"):
        failed = run(command, "-f", str(file), status=1)
        assert failed.stderr.startswith(f"Error: {file}{said}"), failed.stderr
    assert json.loads(run("models", "list", "--json").stdout) == []


def test_a_file_that_is_not_there_is_one_sentence(run: Run, tmp_path: Path) -> None:
    failed = run("apply", "-f", str(tmp_path / "none.yaml"), status=1)
    assert failed.stderr == f"Error: {tmp_path / 'none.yaml'}: No such file or directory\n"


def test_versions_are_listed_and_gone_back_to(run: Run, file: Path) -> None:
    for number in ("1", "2"):
        text = ONE + f"  backend_parameters: [--threads={number}]\n"
        run("apply", "-f", "-", "--yes", stdin=text)
    header, newest, _ = run("models", "versions", "one").stdout.splitlines()
    assert newest.startswith("2 ")
    assert newest[header.index("WANTED") :].startswith("yes")
    assert newest.endswith("--threads=2")
    assert run("models", "rollback", "one").stderr == "model one is at generation 3\n"
    (shown,) = json.loads(run("models", "list", "--json").stdout)
    assert shown["backend_parameters"] == ["--threads=1"]
    run("models", "rollback", "one", "--to", "2")
    none = run("models", "rollback", "one", "--to", "99", status=1)
    assert "model one has no version of generation 99" in none.stderr
