"""A real node that finds a Hugging Face Hub on loopback, with one tiny model on it."""

from collections.abc import Iterator

import pytest

from demo import tiny_gguf
from tests.support.fake_hub import FakeHub, fake_hub
from tests.support.node import Node

REPO, FILE = "Qwen/Qwen3-0.6B-GGUF", "Qwen3-0.6B-Q8_0.gguf"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    path = tiny_gguf.write(tmp_path_factory.mktemp("hub") / FILE, context=256)
    with fake_hub() as made:
        made.repos[REPO] = {FILE: path.read_bytes()}
        yield made


@pytest.fixture(scope="module")
def node(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    node = Node(tmp_path_factory.mktemp("node"))
    node.environment["HF_ENDPOINT"] = hub.url
    node.start()
    yield node
    assert node.stop() == 0
