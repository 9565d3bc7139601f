"""Text of unknown origin, made fit to be shown."""

import re

#: Whole escape sequences first (ECMA-48: CSI, and strings such as OSC that say where they end),
#: then control characters one by one, but for newline and tab.
_CONTROL = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)
_HALF_PAIRS = re.compile("[\ud800-\udfff]")


def plain(text: str) -> str:
    """`text` without what would move a terminal's cursor, colour it or give it orders."""
    return _HALF_PAIRS.sub("\ufffd", _CONTROL.sub("", text))
