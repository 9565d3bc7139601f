"""Real nodes with the real engine on tiny random-weights models."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from demo import tiny_gguf
from tests.support.hosts import Host
from tests.support.node import Node

MakeNode = Callable[..., Node]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with chat.gguf, embed.gguf, rerank.gguf, slow.gguf and broken.gguf."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("chat", "embed", "rerank"):
        tiny_gguf.write(folder / f"{kind}.gguf", kind)
    # Large enough that a stream of some hundred tokens takes seconds.
    tiny_gguf.write(folder / "slow.gguf", "chat", layers=150)
    tiny_gguf.write_broken(folder / "broken.gguf")
    return folder


@pytest.fixture(scope="module")
def make_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeNode]:
    """Make nodes; whatever is left of them is ended after the module."""
    nodes: list[Node] = []

    def make(
        *options: str, name: str = "node", server: Node | None = None, host: Host | None = None
    ) -> Node:
        node = Node(tmp_path_factory.mktemp(name), *options, server=server, host=host)
        nodes.append(node)
        return node

    yield make
    for node in reversed(nodes):
        if node.process is not None:
            node.kill()


@pytest.fixture(scope="module")
def node(make_node: MakeNode) -> Node:
    """A running server node with its own worker."""
    return make_node().start()
