"""Which of the credentials in a request counts."""

import pytest

from gpustack.lib.carriers import Shown, shown

KEY = Shown("k", cookie=False)
UNKNOWN = Shown("", cookie=False)
LOGIN = Shown("s", cookie=True)


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ([], None),
        ([("host", "a")], None),
        ([("authorization", "Bearer k")], KEY),
        ([("authorization", "bearer   k ")], KEY),
        ([("authorization", "Bearer k"), ("x-api-key", "x")], KEY),
        ([("x-api-key", "x"), ("authorization", "Bearer k")], KEY),
        ([("authorization", "Bearer k"), ("authorization", "Bearer x")], KEY),
        ([("authorization", "Basic k")], UNKNOWN),
        ([("authorization", "Basic k"), ("x-api-key", "k")], UNKNOWN),
        ([("authorization", "Bearer")], UNKNOWN),
        ([("authorization", ""), ("cookie", "login=s")], UNKNOWN),
        ([("x-api-key", "k")], KEY),
        ([("x-api-key", "k"), ("x-api-key", "x")], KEY),
        ([("api-key", "x"), ("x-api-key", "k")], KEY),
        ([("x-api-key", " "), ("api-key", "k")], KEY),
        ([("x-api-key", ""), ("api-key", ""), ("cookie", "login=s")], LOGIN),
        ([("x-api-key", "k"), ("cookie", "login=s")], KEY),
        ([("cookie", "a=b; login=s; c=d")], LOGIN),
        ([("cookie", 'login="s"')], LOGIN),
        ([("cookie", "login=x; login=s")], LOGIN),
        ([("cookie", "login=x"), ("cookie", "login=s")], LOGIN),
        ([("cookie", "login=s"), ("cookie", "login=")], LOGIN),
        ([("cookie", "xlogin=s; login2=s; Login=s; s")], None),
        ([("cookie", "login=")], None),
    ],
)
def test_one_credential_of_a_request_counts(
    headers: list[tuple[str, str]], found: Shown | None
) -> None:
    assert shown(headers, "login") == found


def test_a_secret_does_not_print() -> None:
    assert "secret" not in repr(shown([("x-api-key", "secret")], "login"))
