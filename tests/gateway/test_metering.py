"""Token counts out of bytes, and the usage event out of the stream."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpustack.gateway.metering import Reader, StreamReader, Tokens, UsageFilter, WholeReader

USAGE: dict[str, Any] = {
    "prompt_tokens": 7,
    "completion_tokens": 5,
    "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 0},
}


def event(body: object, *, end: bytes = b"\n\n", compact: bool = True) -> bytes:
    separators = (",", ":") if compact else None
    return b"data: " + json.dumps(body, separators=separators).encode() + end


def read(reader: Reader, pieces: list[bytes]) -> bytes:
    return b"".join([reader.feed(piece) for piece in pieces]) + reader.rest()


def split(whole: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(whole) + 1) for cut in cuts), len(whole)]
    return [whole[a:b] for a, b in itertools.pairwise(places)]


def chunk(content: str, **more: Any) -> dict[str, Any]:
    return {"id": "x", "choices": [{"index": 0, "delta": {"content": content}}], **more}


_CONTENT = st.one_of(
    st.text(max_size=20),
    st.sampled_from(['"usage":{"prompt_tokens":1}', '"choices":[]', "data: ", "\n\n", "\r\n\r\n"]),
)


@given(
    contents=st.lists(_CONTENT, max_size=6),
    with_null=st.booleans(),
    end=st.sampled_from([b"\n\n", b"\r\n\r\n"]),
    compact=st.booleans(),
    cuts=st.lists(st.integers(0, 5000), max_size=30),
)
def test_exactly_the_usage_event_is_taken_out_however_the_bytes_are_split(
    contents: list[str], with_null: bool, end: bytes, compact: bool, cuts: list[int]
) -> None:
    more = {"usage": None} if with_null else {}
    before = b": ping" + end
    before += b"".join(event(chunk(c, **more), end=end, compact=compact) for c in contents)
    usage = event({"choices": [], "usage": USAGE}, end=end, compact=compact)
    after = b"data: [DONE]" + end
    reader = UsageFilter()
    assert read(reader, split(before + usage + after, cuts)) == before + after
    assert reader.tokens() == Tokens(7, 5)


@given(st.lists(st.binary(max_size=40), max_size=10))
def test_what_has_no_usage_event_passes_whatever_it_is(pieces: list[bytes]) -> None:
    assert read(UsageFilter(), pieces) == b"".join(pieces)


def test_an_event_with_content_and_usage_stays() -> None:
    whole = event(chunk("a", usage=USAGE))
    reader = UsageFilter()
    assert read(reader, [whole]) == whole
    assert reader.tokens() == Tokens(7, 5)


def test_a_usage_event_without_its_last_blank_line_is_taken_out_too() -> None:
    assert read(UsageFilter(), [event({"choices": [], "usage": USAGE}, end=b"")]) == b""


def test_an_event_name_beside_the_data_goes_with_it() -> None:
    usage = b"event: usage\n" + event({"choices": [], "usage": USAGE})
    assert read(UsageFilter(), [usage + b"data: [DONE]\n\n"]) == b"data: [DONE]\n\n"


def test_whole_events_are_not_held_back() -> None:
    reader = UsageFilter()
    one = event(chunk("a"))
    assert reader.feed(one) == one
    assert reader.feed(one[:10]) == b""
    assert reader.feed(one[10:]) == one


def test_an_endless_event_is_let_go() -> None:
    reader = UsageFilter()
    piece = b"x" * 600_000
    assert reader.feed(piece) == b""
    assert reader.feed(piece) == piece * 2


@given(st.lists(st.integers(0, 5000), max_size=20))
def test_a_stream_with_usage_asked_is_read_and_not_touched(cuts: list[int]) -> None:
    whole = event(chunk("a")) * 5 + event({"choices": [], "usage": USAGE}) + b"data: [DONE]\n\n"
    reader = StreamReader()
    assert read(reader, split(whole, cuts)) == whole
    assert reader.tokens() == Tokens(7, 5)


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"usage": USAGE}, Tokens(7, 5)),
        ({"usage": {"total_tokens": 9}}, Tokens(9, 0)),
        ({"usage": {"prompt_tokens": 9, "total_tokens": 9}}, Tokens(9, 0)),
        ({"usage": None}, None),
        ({"usage": "much"}, None),
        ({}, None),
        ([1], None),
    ],
)
def test_the_usage_of_an_answer_is_found(body: object, tokens: Tokens | None) -> None:
    reader = WholeReader()
    read(reader, [json.dumps(body).encode()])
    assert reader.tokens() == tokens


@pytest.mark.parametrize("first", [True, False])
def test_the_usage_of_a_large_answer_is_found_at_either_end(first: bool) -> None:
    numbers = {"data": [0.123456] * 200_000}
    body = {"usage": USAGE, **numbers} if first else {**numbers, "usage": USAGE, "id": "x"}
    raw = json.dumps(body).encode()
    reader = WholeReader()
    assert read(reader, split(raw, list(range(0, len(raw), 65536)))) == raw
    assert reader.tokens() == Tokens(7, 5)


def test_an_answer_nested_without_end_has_no_usage_and_passes() -> None:
    deep = b'data: {"usage": ' + b"[" * 3000 + b"]" * 3000 + b"}\n\n"
    assert read(UsageFilter(), [deep]) == deep
    whole = b'{"usage": ' + b"[" * 3000 + b"]" * 3000 + b"}"
    reader = WholeReader()
    assert read(reader, [whole]) == whole
    assert reader.tokens() is None


def test_text_that_looks_like_usage_is_no_usage() -> None:
    text = 'I say "usage": {"prompt_tokens": 99}'
    body = {"choices": [{"text": "x" * 70_000}, {"text": text}]}
    reader = WholeReader()
    read(reader, [json.dumps(body).encode()])
    assert reader.tokens() is None
