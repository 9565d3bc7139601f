"""The maker of tiny models. That an engine serves them: tests/worker/test_llama_server.py."""

from pathlib import Path

import gguf
import pytest

from demo import tiny_gguf


@pytest.mark.parametrize("kind", ["chat", "embed", "rerank"])
def test_the_same_seed_gives_the_same_file(kind: tiny_gguf.Kind, tmp_path: Path) -> None:
    first = tiny_gguf.write(tmp_path / "a.gguf", kind, seed=3).read_bytes()
    assert tiny_gguf.write(tmp_path / "b.gguf", kind, seed=3).read_bytes() == first
    assert tiny_gguf.write(tmp_path / "c.gguf", kind, seed=4).read_bytes() != first
    assert len(first) < 1_100_000


def test_a_broken_model_has_a_whole_header_and_half_its_weights(tmp_path: Path) -> None:
    whole = tiny_gguf.write(tmp_path / "whole.gguf")
    broken = tiny_gguf.write_broken(tmp_path / "broken.gguf")
    assert whole.read_bytes().startswith(broken.read_bytes())
    reader = gguf.GGUFReader(whole)
    assert reader.tensors[0].data_offset < broken.stat().st_size < whole.stat().st_size
