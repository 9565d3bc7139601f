"""Whether a browser says that another site made a request."""

import pytest

from gpustack.lib.origin import is_foreign

HOST = "a.example"


@pytest.mark.parametrize(
    ("origin", "fetch_site", "foreign"),
    [
        ("https://a.example", None, False),
        ("https://A.EXAMPLE", "same-origin", False),
        ("https://b.example", None, True),
        ("https://a.example.evil.org", None, True),
        ("https://a.example:8443", None, True),
        ("null", None, True),
        ("https://b.example", "same-origin", True),
        (None, "same-origin", False),
        (None, "none", False),
        (None, "same-site", True),
        (None, "cross-site", True),
        (None, None, False),
    ],
)
def test_a_page_of_another_site_is_known_by_what_its_browser_says(
    origin: str | None, fetch_site: str | None, foreign: bool
) -> None:
    assert is_foreign(origin=origin, host=HOST, fetch_site=fetch_site) is foreign


def test_an_origin_without_a_host_to_compare_is_foreign() -> None:
    assert is_foreign(origin="https://a.example", host=None, fetch_site=None)
