"""The GGUF reader against files that somebody broke on purpose."""

import io
import struct
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpustack.hub import gguf
from gpustack.schemas.profiles import Profile


def outcome(content: bytes, size: int | None = None) -> Profile | gguf.Broken:
    size = len(content) if size is None else size
    try:
        header = gguf.read(io.BytesIO(content), size)
        return gguf.profile(header, weights_bytes=header.tensor_bytes or size, source="")
    except gguf.Broken as error:
        return error


mutations = st.lists(
    st.tuples(
        st.integers(0, 16_000),
        st.one_of(
            st.binary(min_size=1, max_size=8),
            st.sampled_from([b"\xff" * 8, b"\x00" * 8, struct.pack("<Q", 2**31), b"\x09\0\0\0"]),
        ),
    ),
    min_size=1,
    max_size=6,
)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=mutations, cut=st.integers(0, 700_000), size=st.sampled_from([None, 2**40]))
def test_any_file_gives_a_profile_or_a_clear_error(
    model: bytes, changes: list[tuple[int, bytes]], cut: int, size: int | None
) -> None:
    content = bytearray(model)
    for place, piece in changes:
        content[place : place + len(piece)] = piece
    began = time.monotonic()
    found = outcome(bytes(content[:cut]), size)
    assert time.monotonic() - began < 5
    if isinstance(found, Profile):
        numbers = found.model_dump(exclude={"weights_bytes"}).values()
        assert all(0 <= n <= gguf.MAX_CONTEXT for n in numbers if isinstance(n, int))
    else:
        assert str(found)


def test_a_claimed_length_is_never_allocated() -> None:
    key = struct.pack("<Q1s", 1, b"k")
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key
    claims = [
        head + struct.pack("<IQ", 8, 2**39),
        head + struct.pack("<IIQ", 9, 0, 2**39),
        head + struct.pack("<IIQ", 9, 8, 2**21),
    ]
    tracemalloc.start()
    for content in claims:
        assert isinstance(outcome(content, 2**40), gguf.Broken | Profile)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_facts_that_no_model_has_are_refused() -> None:
    name = struct.pack("<Q20sIQ5s", 20, b"general.architecture", 8, 5, b"llama")
    layers = struct.pack("<Q17sII", 17, b"llama.block_count", 4, 2**32 - 1)
    found = outcome(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + name + layers)
    assert isinstance(found, gguf.Broken)
    assert "llama.block_count is 4294967295" in str(found)


def test_heads_that_differ_by_layer_count_as_the_most() -> None:
    name = struct.pack("<Q20sIQ5s", 20, b"general.architecture", 8, 5, b"llama")
    key = struct.pack("<Q", 29) + b"llama.attention.head_count_kv"
    heads = key + struct.pack("<IIQIII", 9, 4, 3, 0, 8, 2)
    found = outcome(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + name + heads)
    assert isinstance(found, Profile)
    assert found.kv_heads == 8


KEY = struct.pack("<Q1s", 1, b"k")


@pytest.mark.parametrize(
    ("head", "each", "count"),
    [
        (struct.pack("<IQQ", 3, 0, 8), struct.pack("<IIQ", 9, 8, 10**6) + bytes(8 * 10**6), 8),
        (struct.pack("<IQQ", 3, 0, 9999), struct.pack("<IIQ", 9, 0, 4096) + bytes(4096), 9999),
        (
            struct.pack("<IQQ", 3, 100_000, 0),
            struct.pack("<I8QIQ", 8, *[1] * 8, 0, 0),
            100_000,
        ),
    ],
    ids=["texts", "numbers", "tensors"],
)
def test_a_header_costs_at_most_two_seconds_of_a_processor(
    head: bytes, each: bytes, count: int
) -> None:
    content = b"GGUF" + head + (KEY + each) * count
    began = time.process_time()
    outcome(content)
    assert time.process_time() - began < 2


def test_what_is_counted_is_the_whole_header_not_one_list() -> None:
    texts = KEY + struct.pack("<IIQ", 9, 8, 10**6) + bytes(8 * 10**6)
    found = outcome(b"GGUF" + struct.pack("<IQQ", 3, 0, 3) + texts * 3)
    assert str(found) == "its header claims 3000000 texts in lists"
    numbers = KEY + struct.pack("<IIQ", 9, 0, 4096) + bytes(4096)
    found = outcome(b"GGUF" + struct.pack("<IQQ", 3, 0, 500) + numbers * 500)
    assert str(found) == "its header claims 2002944 numbers in lists"
    text = KEY + struct.pack("<IQ", 8, 60 << 20) + bytes(60 << 20)
    found = outcome(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + text + text)
    assert str(found) == "its header is longer than 67108864 bytes"
