"""What both ends of a forwarded HTTP/1.1 message share: header lists and how they are written."""

from http import HTTPStatus
from typing import Final

Headers = list[tuple[bytes, bytes]]  # lower-case names, in the order they came

#: Fields of one connection, never of the message: RFC 9110 section 7.6.1, and what old clients
#: still send. `transfer-encoding` is made anew by whoever writes the message.
HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    }
)

#: What `Connection` must not take away: the message's framing, and what says who asks and from
#: where. A request without them could pass for another's, or for one that needs no login.
_NEVER_HOP_BY_HOP: Final = frozenset(
    {
        b"content-length",
        b"host",
        b"authorization",
        b"x-api-key",
        b"api-key",
        b"cookie",
        b"origin",
        b"sec-fetch-site",
    }
)

_REASONS: Final = {status.value: status.phrase.encode() for status in HTTPStatus}
_STATUS_LINES: Final[dict[int, bytes]] = {
    status: b"HTTP/1.1 %d %b\r\n" % (status, reason) for status, reason in _REASONS.items()
}


class HttpError(Exception):
    """The other side broke the protocol, or asked for something that is refused.

    Attributes:
        status: what a server answers to it.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def status_line(status: int) -> bytes:
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


def first(headers: Headers, name: bytes) -> bytes | None:
    """The value of the first header called `name` (lower case)."""
    for known, value in headers:
        if known == name:
            return value
    return None


def end_to_end(headers: Headers) -> Headers:
    """`headers` without those of the connection they came on."""
    named: frozenset[bytes] = HOP_BY_HOP
    for name, value in headers:
        if name == b"connection":
            words = {word.strip() for word in value.lower().split(b",")}
            named = named | (words - _NEVER_HOP_BY_HOP)
    return [pair for pair in headers if pair[0] not in named]


def framing(headers: Headers) -> tuple[int | None, bool]:
    """(content length or None, whether the body is chunked) of a message.

    Raises:
        HttpError: two readers could disagree where the message ends.
    """
    length: int | None = None
    chunked = False
    for name, value in headers:
        if name == b"content-length":
            if length is not None or not value.isdigit() or len(value) > 18:
                raise HttpError(400, "Content-Length must be one number")
            length = int(value)
        elif name == b"transfer-encoding":
            if chunked or value.strip().lower() != b"chunked":
                raise HttpError(400, "the only transfer coding is chunked")
            chunked = True
    if chunked and length is not None:
        raise HttpError(400, "Content-Length and Transfer-Encoding exclude each other")
    return length, chunked


def write_head(first_line: bytes, headers: Headers) -> bytes:
    """The head of a message up to and with its empty line."""
    lines = [first_line]
    lines.extend([b"%b: %b\r\n" % pair for pair in headers])
    lines.append(b"\r\n")
    return b"".join(lines)
