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


#: A colour or another look of what follows (ECMA-48: SGR): the one sequence that can do no harm.
_LOOK = re.compile(r"\x1b\[[0-9;:]*m")
#: The beginning of a sequence whose end may be still to come.
_BEGUN = re.compile(r"\x1b(?:\[[0-?]*[ -/]*)?")


def plain(text: str, *, colours: bool = False) -> str:
    """`text` without what would move a terminal's cursor, colour it or give it orders.

    Args:
        colours: those may stay.
    """

    def kept(found: re.Match[str]) -> str:
        return found[0] if colours and _LOOK.fullmatch(found[0]) else ""

    return _HALF_PAIRS.sub("\ufffd", _CONTROL.sub(kept, text))


def split_sequence(text: str) -> tuple[str, str]:
    """`text` and what at its end may be half an escape sequence, for pieces of a longer text."""
    at = text.rfind("\x1b", max(0, len(text) - 64))
    if at >= 0 and _BEGUN.fullmatch(text, at):
        return text[:at], text[at:]
    return text, ""
