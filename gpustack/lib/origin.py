"""What a browser says of the page that makes a request."""


def authority(origin: str) -> str | None:
    """The host and port of an Origin header; None if it has none ("null")."""
    scheme, mark, rest = origin.lower().partition("://")
    if not mark or scheme not in {"http", "https"} or not rest or "/" in rest:
        return None
    return rest


def is_foreign(*, origin: str | None, host: str | None, fetch_site: str | None) -> bool:
    """Whether a browser says that a page of another site made the request.

    A browser sends its cookies along with what other sites' pages ask for; `Origin` and
    `Sec-Fetch-Site` are how it says so, and no page can set them. A program that is no browser
    sends neither, and no cookie by itself.
    """
    if origin is not None:
        return host is None or authority(origin) != host.lower()
    return fetch_site not in {None, "same-origin", "none"}
