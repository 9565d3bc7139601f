"""A worker and its control plane, one of each per test."""

import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.control_plane import ControlPlane, listening
from tests.support.ports import free_ports
from tests.support.worker_node import Node


@pytest.fixture
async def plane() -> AsyncIterator[ControlPlane]:
    port = free_ports(1)
    plane = ControlPlane(port)
    async with listening(plane):
        yield plane


@pytest.fixture
def node(tmp_path: Path, plane: ControlPlane) -> Iterator[Node]:
    port = free_ports(11)  # one for its API, ten for engines
    made = Node(tmp_path, plane, port, port + 1)
    yield made
    for pid in made.engines():
        os.kill(pid, signal.SIGKILL)
