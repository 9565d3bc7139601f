"""Profiles of local files, and of files that only the Hub has."""

import asyncio
import os
import struct
import threading
from pathlib import Path

import pytest

from demo import tiny_gguf
from gpustack.errors import Invalid, NotFound, Unavailable
from gpustack.hub import profiles
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
    assert found.weights_bytes == path.stat().st_size


@pytest.mark.parametrize(("offset", "words"), [(0, "its header claims"), (2**50, "is cut")])
async def test_tensors_that_a_file_cannot_hold_weigh_what_the_file_weighs(
    offset: int, words: str, tmp_path: Path
) -> None:
    tensor = struct.pack("<Q1sIQIQ", 1, b"t", 1, 2**20, 0, offset)
    content = b"GGUF" + struct.pack("<IQQ", 3, 4, 0) + tensor * 4 + bytes(2**22 + 64)
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    found = await profile(local(path))
    assert found.weights_bytes == len(content)
    assert words in found.problem


async def test_only_regular_files_are_read(tmp_path: Path) -> None:
    pipe = tmp_path / "m.gguf"
    os.mkfifo(pipe)
    async with asyncio.timeout(5):
        for path in (pipe, Path("/dev/zero"), Path("/dev/tty")):
            for _ in range(20):
                with pytest.raises(Invalid, match="neither a regular file nor a folder"):
                    await profile(local(path))
        (tmp_path / "a").write_bytes(b"12345")
        (tmp_path / "dangling").symlink_to(tmp_path / "none")
        assert (await profile(local(tmp_path))).weights_bytes == 5


@pytest.mark.parametrize("name", ["x" * 300 + ".gguf", "m.gguf/x.gguf"])
async def test_a_path_that_cannot_be_looked_for_has_a_problem(name: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"x")
    found = await profile(local(tmp_path / name))
    assert "cannot be read: " in found.problem


async def test_a_name_with_a_zero_byte_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"file not found: .*ab\.gguf"):
        await profile(local(tmp_path / "a\0b.gguf"))


async def test_a_disk_that_does_not_answer_is_given_up_and_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()

    def hang(path: Path, found: os.stat_result) -> None:
        answers.wait(20)

    path = tmp_path / "m.gguf"
    path.write_bytes(b"x")
    monkeypatch.setattr(profiles, "READ_S", 0.2)
    monkeypatch.setattr(profiles, "_check", hang)
    try:
        for words in ["within 0.2 s"] * profiles.READERS + ["16 other files"]:
            with pytest.raises(Unavailable, match=words):
                await profile(local(path))
        async with asyncio.timeout(1):
            await asyncio.to_thread(path.stat)  # the program's other threads are free
    finally:
        answers.set()
    async with asyncio.timeout(5):
        while not profiles._readers.acquire(blocking=False):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    profiles._readers.release()
    assert "ends within" in (await profile(local(path))).problem


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
