"""What docs/client.md shows is true: its code runs against a real node, block by block."""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpustack.client import Client
from gpustack.client.collections import Resource
from tests.client.conftest import FILE
from tests.support.node import Node

DOCS = Path(__file__).resolve().parents[2] / "docs"
ENGLISH, CHINESE = DOCS / "client.md", DOCS / "zh/client.md"


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def table(page: Path) -> dict[str, set[str]]:
    """Resource -> its methods, as the page's table has them."""
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \|([a-z_, ]+)\|$", page.read_text(), re.MULTILINE)
    return {name: set(re.findall(r"\w+", methods)) for name, methods in rows}


async def run(code: str, names: dict[str, Any]) -> None:
    """Run code that awaits at its top, as `python -m asyncio` does."""
    compiled = compile(code, str(ENGLISH), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(compiled, names)  # noqa: S307
    if inspect.isawaitable(result):
        await result


def test_the_program_that_connects_runs(node: Node) -> None:
    script, *_ = blocks(ENGLISH)
    variables = {"GPUSTACK_SERVER_URL": node.url, "GPUSTACK_API_KEY": node.api_key()}
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | variables, capture_output=True, text=True,
        timeout=30, check=True,
    )  # fmt: skip
    assert done.stdout == "admin is connected\n"


async def test_all_that_follows_runs_inside_it(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    _, *others = blocks(ENGLISH)
    async with Client(node.url, node.api_key()) as client:
        names: dict[str, Any] = {"client": client}
        for block in others:
            await run(block, names)
    said = capsys.readouterr().out
    assert re.search(r"^qwen-\w{5} running", said, re.MULTILINE), said
    assert re.search(rf"^ready \d+ \['.*/{re.escape(FILE)}'\]$", said, re.MULTILINE), said
    assert "\n2 [1]\n" in said
    assert said.endswith("no model is called no-such-model\n")


def test_both_languages_show_the_same_code() -> None:
    assert blocks(ENGLISH) == blocks(CHINESE)
    assert len(blocks(ENGLISH)) == 6


@pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=["en", "zh"])
async def test_the_table_names_every_resource_and_method(page: Path) -> None:
    named = table(page)
    async with Client("http://127.0.0.1:1") as client:
        attributes = vars(client).items()
        found = {
            name: {word for word in dir(one) if word.islower() and word[0] != "_"}
            for name, one in attributes
            if isinstance(one, Resource)
        }
    assert named == {name: methods - {"list", "page"} for name, methods in found.items()}
