"""A real node, and the command line as users run it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from demo import tiny_gguf
from tests.support.node import Node

Run = Callable[..., subprocess.CompletedProcess[str]]


def environment(data_dir: Path) -> dict[str, str]:
    """Ours, with nothing of gpustack in it but the data directory."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GPUSTACK_")}
    return kept | {"GPUSTACK_DATA_DIR": str(data_dir)}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    node = Node(tmp_path_factory.mktemp("node"))
    node.start()
    yield node
    assert node.stop() == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("models") / "chat.gguf", context=256)


@pytest.fixture
def run(node: Node) -> Run:
    """Run `gpustack …` on the node's machine; what it printed may be no traceback."""

    def run(
        *words: str, status: int = 0, stdin: str = "", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "gpustack", *words],
            env=environment(node.data_dir) | variables,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == status, done.stderr
        return done

    return run
