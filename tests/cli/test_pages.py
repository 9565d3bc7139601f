"""What docs/changes.md shows is true: its commands run on a real node, one after the other."""

import re
from pathlib import Path

import pytest

from gpustack.schemas.apply import Apply
from gpustack.server.db import history
from tests.cli.conftest import Run

DOCS = Path(__file__).resolve().parents[2] / "docs"
ENGLISH, CHINESE = DOCS / "changes.md", DOCS / "zh/changes.md"


def manifest(page: Path) -> str:
    (text,) = re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
    return str(text)


def commands(page: Path) -> list[str]:
    return re.findall(r"^    gpustack (.*?) +#", page.read_text(), re.MULTILINE)


def test_the_commands_run_in_their_order(run: Run, tmp_path: Path) -> None:
    text = manifest(ENGLISH)
    run("apply", "-f", "-", "--yes", stdin=text.replace("8192", "4096"))
    (tmp_path / "cluster.yaml").write_text(text)
    said = {}
    for command in commands(ENGLISH):
        words = [str(tmp_path / word) if ".yaml" in word else word for word in command.split()]
        said[command] = run(*words, *["--yes"] * (words[0] == "apply")).stdout
    assert len(said) == 9
    assert said["diff -f cluster.yaml"].startswith("~ model qwen")
    assert "--ctx-size=8192" in (tmp_path / "now.yaml").read_text()
    assert "--ctx-size=4096" in run("export").stdout  # it was rolled back since
    assert "generation 2: what its instances are started from" in said["events qwen"]
    assert "entries 1 to 3 are as they were written" in said["audit verify"]
    run("models", "delete", "qwen")


def test_both_languages_show_the_same() -> None:
    assert manifest(ENGLISH) == manifest(CHINESE)
    assert commands(ENGLISH) == commands(CHINESE)


@pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=["en", "zh"])
def test_the_bounds_are_those_of_the_code(page: Path) -> None:
    text = page.read_text()
    assert f"{history.KEPT_EVENTS:,}" in text
    assert f"{history.KEPT_AUDIT_ENTRIES:,}" in text
    assert f"{history.EVENTS_KEPT_FOR.days} " in text
    limits = [one.max_length for one in Apply.model_fields["models"].metadata]
    assert limits == [1000]
    assert " 1000 " in text
