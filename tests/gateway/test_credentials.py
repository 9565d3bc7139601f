"""Gateway and server read the same credential in the same request."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from gpustack.gateway import credentials
from gpustack.schemas.wire import SESSION_COOKIE
from gpustack.server.auth import principals

_NAMES = st.sampled_from([b"authorization", b"x-api-key", b"api-key", b"cookie", b"host"])
_VALUES = st.sampled_from(
    [b"", b" ", b"Bearer k", b"bearer  k2", b"Basic k", b"Bearer", b"k", b"\xff", b"Bearer \xff"]
    + [f"{SESSION_COOKIE}={value}".encode() for value in ("s", "", '"q"', "s; a=b")]
    + [f"a=b; {SESSION_COOKIE}=one; {SESSION_COOKIE}=two".encode()]
)


@given(st.lists(st.tuples(_NAMES, _VALUES), max_size=6))
def test_no_request_is_one_user_at_the_gateway_and_another_at_the_server(
    headers: list[tuple[bytes, bytes]],
) -> None:
    assert credentials.presented(headers) == principals.presented(Headers(raw=headers))


_PAGES = st.sampled_from([b"origin", b"host", b"sec-fetch-site", b"accept"])
_SAID = st.sampled_from(
    [
        *b"/ a A a/b null http:// https://a http://A http://a/b ftp://a same-origin".split(),
        *(b"", b"cross-site", b"\xff", b"http://\xff"),
    ]
)


@given(st.lists(st.tuples(_PAGES, _SAID), max_size=5))
def test_no_page_is_foreign_to_the_gateway_and_not_to_the_server(
    headers: list[tuple[bytes, bytes]],
) -> None:
    there = principals._is_foreign(Headers(raw=headers))
    assert credentials.from_foreign_page(headers) == there


@pytest.mark.parametrize("value", [b"Basic a2V5", b"Negotiate x", b""])
def test_another_scheme_is_a_credential_that_nobody_knows(value: bytes) -> None:
    headers = [(b"authorization", value), (b"cookie", SESSION_COOKIE.encode() + b"=s")]
    shown = credentials.presented(headers)
    assert shown is not None
    assert (shown.secret, shown.cookie) == ("", False)
