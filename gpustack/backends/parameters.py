"""Users' backend parameters: `--name=value`, `--name value` in one text, or two texts."""

from collections.abc import Iterator, Sequence


def flat(parameters: Sequence[str]) -> list[str]:
    """One argv word per item: "--name value" in one text becomes two, quotes are not special."""
    words: list[str] = []
    for item in parameters:
        name, space, value = item.strip().partition(" ")
        words += [name, value.strip()] if space and name.startswith("-") else [item.strip()]
    return words


def names(parameters: Sequence[str]) -> Iterator[str]:
    """The option names that stand in `parameters`."""
    for word in flat(parameters):
        if word.startswith("-") and not _is_number(word):
            yield _name(word)


def _name(word: str) -> str:
    """llama.cpp takes underscores for dashes in long options, so they are no way around a name."""
    name = word.partition("=")[0]
    return name.replace("_", "-") if name.startswith("--") else name


def whole_number(text: str) -> int | None:
    """The number that `text` is, at most nine digits; None if it is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else None


def find(parameters: Sequence[str], option: str) -> str | None:
    """The last value given for `option`; None if it is not there."""
    words, found = flat(parameters), None
    for position, word in enumerate(words):
        _, equals, value = word.partition("=")
        if _name(word) == option:
            following = words[position + 1] if position + 1 < len(words) else ""
            found = value if equals else following
    return found


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
