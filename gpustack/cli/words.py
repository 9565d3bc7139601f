"""What people read: text that a terminal shows as it is, and failures as one sentence."""

import os
from contextlib import suppress
from typing import IO, Any

from gpustack.errors import GPUStackError, Invalid
from gpustack.lib.text import plain


def line(text: str) -> str:
    """`text`, plain, on one line."""
    return plain(" ".join(text.split()))


def typed(given: Any) -> Any:
    """A word of the command line, or several, as the UTF-8 that was typed.

    In a locale that is not UTF-8, Python hands over halves of surrogate pairs instead.

    Raises:
        Invalid: it is not UTF-8.
    """
    if isinstance(given, tuple):
        return tuple(typed(one) for one in given)
    if not isinstance(given, str):
        return given
    try:
        return given.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        raise Invalid(f"{given!a} is not UTF-8") from None


def reason(error: Exception) -> str | None:
    """The sentence for whoever asked; None for an error that is a bug of ours."""
    from httpx import HTTPError, InvalidURL  # help needs neither
    from pydantic import ValidationError

    if isinstance(error, OSError):
        what = error.strerror or type(error).__name__
        return line(what if error.filename is None else f"{error.filename}: {what}")
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        return line(f"{field}: {said}" if field else said)
    if isinstance(error, UnicodeError):
        return line(f"text that cannot be read or written here: {error}")
    if isinstance(error, GPUStackError | InvalidURL | HTTPError):
        return line(str(error) or type(error).__name__)  # time-outs carry no text
    return None


def give_up(stream: IO[str] | None) -> None:
    """Drop what `stream` holds if nobody takes it any more: its flush at exit would fail."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
