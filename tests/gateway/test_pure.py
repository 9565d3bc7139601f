"""The gateway's pure decisions: choice, counts, what a body asks, a model's name found early."""

import json
import os
import tempfile
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpustack.errors import BadRequest
from gpustack.gateway.asked import understand
from gpustack.gateway.choice import Candidate, choose
from gpustack.gateway.counts import SLOTS, Counts
from gpustack.gateway.partial import model_of
from gpustack.gateway.passing import is_endless

_CANDIDATES = st.lists(
    st.builds(Candidate, st.integers(0, 3), st.booleans(), st.booleans()), max_size=6
)


@given(_CANDIDATES, st.integers(0, 1000))
def test_nobody_better_is_ever_passed_over(candidates: list[Candidate], turn: int) -> None:
    index = choose(candidates, turn)
    if index is None:
        assert not candidates
        return
    chosen = candidates[index]
    for other in candidates:
        assert (chosen.last_resort, chosen.resting, chosen.outstanding) <= (
            other.last_resort,
            other.resting,
            other.outstanding,
        )


def test_equals_take_turns() -> None:
    same = [Candidate(1), Candidate(0), Candidate(0), Candidate(0)]
    assert [choose(same, turn) for turn in range(6)] == [1, 2, 3, 1, 2, 3]


def test_processes_see_each_others_counts_and_a_new_one_starts_at_zero() -> None:
    with tempfile.TemporaryFile() as file:
        one, two = Counts.shared(file.fileno(), 2, 0), Counts.shared(file.fileno(), 2, 1)
        one.add(5, 1)
        two.add(5, 2)
        assert one.total(5) == two.total(5) == 3
        assert one.total(5 + SLOTS) == 3
        assert one.total(6) == 0
        again = Counts.shared(file.fileno(), 2, 1)
        assert again.total(5) == 1
        assert os.fstat(file.fileno()).st_size == 2 * SLOTS * 4


@pytest.mark.parametrize(
    ("body", "injected"),
    [
        ({"model": "m"}, False),
        ({"model": "m", "stream": False}, False),
        ({"model": "m", "stream": True}, True),
        ({"model": "m", "stream": True, "stream_options": None}, True),
        ({"model": "m", "stream": True, "stream_options": {}}, True),
        ({"model": "m", "stream": True, "stream_options": {"include_usage": False}}, True),
        ({"model": "m", "stream": True, "stream_options": {"include_usage": True}}, False),
        ({"model": "m", "stream": True, "stream_options": 5}, False),
        ({"model": "m", "stream": "true"}, False),
    ],
)
def test_usage_is_asked_for_only_where_a_stream_would_not_have_it(
    body: object, injected: bool
) -> None:
    raw = json.dumps(body).encode()
    asked = understand(raw, has_stream=True)
    assert asked.injected is injected
    if injected:
        assert json.loads(asked.body)["stream_options"]["include_usage"] is True
    else:
        assert asked.body is raw
    assert understand(raw, has_stream=False).body is raw


def test_what_else_is_in_a_rewritten_body_survives() -> None:
    raw = (
        b'{"model":"m","stream":true,"big":12345678901234567890.123456789,"dup":{"a":1,"a":2},'
        b'"stream_options":{"x":[1]}}'
    )
    asked = understand(raw, has_stream=True)
    assert b"12345678901234567890.123456789" in asked.body
    assert b'{"a":1,"a":2}' in asked.body
    assert json.loads(asked.body)["stream_options"] == {"x": [1], "include_usage": True}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"5", b"{}", b'{"model":null}', b"\xff\xfe"])
def test_a_body_without_a_model_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest):
        understand(body, has_stream=True)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["model", "a", '"', "\\"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.lists(_JSON, max_size=4), st.text(max_size=10), st.integers(0, 200))
def test_a_models_name_is_found_early_or_not_at_all(
    before: list[object], name: str, cut: int
) -> None:
    fields = {f"k{number}": value for number, value in enumerate(before)}
    raw = json.dumps({**fields, "model": name, "after": [1]}).encode()
    assert model_of(raw) == name
    assert model_of(raw[:cut]) in (name, None)
    assert model_of(json.dumps(fields).encode()) is None


def test_a_models_name_that_is_no_text_is_none() -> None:
    assert model_of(b'{"model": "\xff", "messages": []}') is None


def test_looking_for_a_model_is_quick_whatever_comes() -> None:
    for hostile in (b'{"a":' + b"[" * 8_000_000, b'{"a":"' + b"\\" * 8_000_000,
                    b'{"a":' + b'"' * 8_000_000, b"," * 8_000_000):  # fmt: skip
        started = time.process_time()
        assert model_of(hostile) is None
        assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("query", "endless"),
    [
        ("follow=true", True), ("tail=5&follow=1", True), ("Watch=TRUE&since=x", True),
        ("follow=yes", True), ("follow=false", False), ("follow=0", False), ("", False),
        ("unfollow=true", False), ("tail=1", False), ("follow", False),
    ],
)  # fmt: skip
def test_what_goes_on_until_somebody_ends_it_is_known_by_its_query(
    query: str, endless: bool
) -> None:
    assert is_endless(query) is endless
