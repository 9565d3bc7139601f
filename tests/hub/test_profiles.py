"""Profiles of local files, and of files that only the Hub has."""

import struct
from pathlib import Path

import pytest

from demo import tiny_gguf
from gpustack.errors import NotFound
from gpustack.hub.profiles import profile
from gpustack.schemas.models import Source, VersionSpec
from tests.support.fake_hub import FakeHub


def local(path: Path) -> VersionSpec:
    return VersionSpec(source=Source.LOCAL_PATH, local_path=str(path))


@pytest.mark.parametrize(
    ("kind", "architecture", "pooling"),
    [("chat", "llama", ""), ("embed", "llama", "mean"), ("rerank", "bert", "rank")],
)
async def test_a_profile_says_what_the_file_says(
    kind: tiny_gguf.Kind, architecture: str, pooling: str, tmp_path: Path
) -> None:
    path = tiny_gguf.write(tmp_path / "m.gguf", kind, context=512)
    found = await profile(local(path))
    assert (found.architecture, found.pooling) == (architecture, pooling)
    assert (found.layers, found.attention_heads, found.head_dim) == (2, 4, 16)
    assert (found.embedding_length, found.vocabulary, found.max_context) == (64, 608, 512)
    assert found.kv_heads == (4 if kind == "rerank" else 2)
    assert found.problem == ""
    size = path.stat().st_size
    assert size - 32_000 < found.weights_bytes < size


async def test_a_cut_file_has_its_facts_and_a_problem(tmp_path: Path) -> None:
    path = tiny_gguf.write_broken(tmp_path / "m.gguf")
    found = await profile(local(path))
    assert found.layers == 2
    assert "is cut" in found.problem


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "ends within"),
        (b"hello world, I am text", "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "9223372036854775808 tensors"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), "a text of"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 99), "unknown type 99"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 2**60), "texts"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 3), "list of unknown type"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 0, 2**60), "ends within"),
    ],
)
async def test_an_unreadable_header_gives_the_size_and_the_reason(
    content: bytes, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    found = await profile(local(path))
    assert found.weights_bytes == len(content)
    assert words in found.problem


async def test_a_folder_weighs_what_its_files_weigh(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a").write_bytes(b"12345")
    assert (await profile(local(tmp_path))).weights_bytes == 5


async def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"none\.gguf"):
        await profile(local(tmp_path / "none.gguf"))


async def test_a_split_file_weighs_what_all_its_parts_weigh(tmp_path: Path) -> None:
    first = tiny_gguf.write(tmp_path / "m-00001-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(bytes(1000))
    found = await profile(local(first))
    assert found.weights_bytes == first.stat().st_size + 1000
    assert found.layers == 2


@pytest.mark.parametrize(
    ("repo", "file"), [("org/one", None), ("org/many", "*Q8_0.gguf"), ("org/split", "*.gguf")]
)
async def test_a_remote_header_is_read_without_the_weights(
    repo: str, file: str | None, hub: FakeHub, model: bytes
) -> None:
    name = "one.gguf" if file is None else None
    if name:
        hub.repos[repo][name] = model + bytes(30_000_000)
    spec = VersionSpec(
        source=Source.HUGGING_FACE, huggingface_repo_id=repo, huggingface_filename=file
    )
    found = await profile(spec, endpoint=hub.url)
    assert (found.layers, found.vocabulary, found.problem) == (2, 608, "")
    assert hub.sent_bytes < 4_000_000
    if repo == "org/split":
        assert found.weights_bytes == 3 * (len(model) + 1)


async def test_a_long_remote_header_is_read_in_larger_pieces(hub: FakeHub) -> None:
    text = struct.pack("<Q", 5) + b"token"
    tokens = struct.pack("<Q", 21) + b"tokenizer.ggml.tokens" + struct.pack("<IIQ", 9, 8, 150_000)
    name = struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, 5) + b"llama"
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + tokens + text * 150_000 + name
    hub.repos["org/long"] = {"long.gguf": header + bytes(3_000_000)}
    spec = VersionSpec(source=Source.HUGGING_FACE, huggingface_repo_id="org/long")
    found = await profile(spec, endpoint=hub.url)
    assert (found.architecture, found.vocabulary) == ("llama", 150_000)
    assert len(hub.ranges) == 2
