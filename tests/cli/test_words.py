"""What people read. That commands use it: test_commands.py, test_chat.py."""

import pytest

from gpustack.cli.tables import aligned
from gpustack.cli.words import line, typed
from gpustack.errors import Invalid
from gpustack.lib.text import plain, split_sequence


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("one\n\ttwo é 模", "one\n\ttwo é 模"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;a title\x07name\x1b]8;;http://x\x1b\\", "name"),
        ("\x1b]0;without an end", "]0;without an end"),
        ("\x9b2Jname\x07\x08\x7f\r", "name"),
        ("half \ud800", "half \ufffd"),
    ],
)
def test_a_terminal_gets_no_orders_from_a_text(given: str, shown: str) -> None:
    assert plain(given) == shown


def test_a_cell_is_one_printable_line() -> None:
    assert aligned([["NAME", "WHY"], ["a\x1b[2Jb\nc\rd", "x"]]) == "NAME    WHY\nab c d  x"
    assert line(" two\r\nlines \x1b[1A") == "two lines "


def test_words_of_another_locale_are_what_was_typed() -> None:
    assert typed(("h\udcc3\udca9", 3, None)) == ("hé", 3, None)
    with pytest.raises(Invalid, match="is not UTF-8"):
        typed("h\udcc3")


def test_colours_may_stay_and_are_not_cut_in_two() -> None:
    said = "\x1b[1;31mred\x1b[0m \x1b[2J\x1b]0;title\x07\x1b[10;5Hhere\x1b[38:5:1m\n"
    assert plain(said) == "red here\n"
    assert plain(said, colours=True) == "\x1b[1;31mred\x1b[0m here\x1b[38:5:1m\n"
    for at in range(len("\x1b[1;31mred\x1b[0m ")):
        shown, held = split_sequence(said[:at])
        assert shown + held == said[:at]
        rest = plain(held + said[at:], colours=True)
        assert plain(shown, colours=True) + rest == plain(said, colours=True)
