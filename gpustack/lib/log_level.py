"""The log level of this process, by name: read and changed while it runs."""

import logging

logger = logging.getLogger(__name__)

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
#: Longer than any way to write one.
LIMIT_BYTES = 64


def current() -> str:
    return logging.getLevelName(logging.getLogger().level)


def parse(raw: bytes) -> str:
    """The level that `raw` names, bare or as a JSON string, in any case.

    Raises:
        ValueError: none of `LEVELS`; the message is a sentence.
    """
    word = raw.decode("utf-8", "replace").strip()
    bare = word[1:-1] if len(word) > 1 and word[0] == word[-1] == '"' else word
    if bare.upper() not in LEVELS:
        raise ValueError(f"want one of the log levels {', '.join(LEVELS)}, got {word[:32]!a}")
    return bare.upper()


def change(level: str) -> None:
    """Log what is of `level` or above from now on, until the process ends or is told otherwise."""
    logging.getLogger().setLevel(level)
    logger.info("log level is now %s", level)
