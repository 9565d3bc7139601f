"""A Hub, and a model on it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from demo import tiny_gguf
from tests.support.fake_hub import FakeHub, fake_hub


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny_gguf.write(tmp_path_factory.mktemp("model") / "m.gguf").read_bytes()


@pytest.fixture
def hub(model: bytes) -> Iterator[FakeHub]:
    with fake_hub() as made:
        made.repos["org/one"] = {"README.md": b"hello", "config.json": b"{}", "one.gguf": model}
        made.repos["org/many"] = {
            "many-Q4_K_M.gguf": model,
            "many-Q8_0.gguf": model + b"8",
            "sub dir/many-F16.gguf": model,
        }
        made.repos["org/split"] = {
            f"split-{n:05d}-of-00003.gguf": model + bytes([n]) for n in (1, 2, 3)
        }
        yield made


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
