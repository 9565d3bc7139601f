"""PURE: the model's name from the beginning of a JSON body that is too large to hold."""

import re
from typing import Final

import msgspec

from gpustack.lib.decode import UNREADABLE

#: A string (its end may be cut off), a bracket, or a comma or colon.
_TOKEN: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[{}\[\],:]', re.DOTALL)
#: Enough for thousands of messages, and less than a tenth of a second of work.
_TOKENS: Final = 200_000


def model_of(beginning: bytes) -> str | None:
    """The value of the top-level key "model", if it is in the first bytes of a JSON object."""
    depth = 0
    key: bytes | None = None
    for count, match in enumerate(_TOKEN.finditer(beginning)):
        token = match.group()
        kind = token[:1]
        if kind in b"{[":
            depth += 1
        elif kind in b"}]":
            depth -= 1
        elif depth != 1:
            pass
        elif kind == b",":
            key = None
        elif kind == b'"':
            if key == b'"model"' and match.end() < len(beginning):
                return _text(token)
            key = token
        if depth < 1 or count > _TOKENS:
            return None
    return None


def _text(raw: bytes) -> str | None:
    try:
        return msgspec.json.decode(raw, type=str)
    except UNREADABLE:
        return None
