"""One line per event: a constant message, then key=value facts a machine can grep."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

#: `--debug` as this process was last told.
_told: dict[str, bool] = {}
_context: ContextVar[tuple[tuple[str, object], ...]] = ContextVar("log_context", default=())


@contextmanager
def log_context(**facts: object) -> Iterator[None]:
    """Attach `facts` to every record logged inside, across awaits and child tasks."""
    token = _context.set((*_context.get(), *facts.items()))
    try:
        yield
    finally:
        _context.reset(token)


class ContextFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.facts = "".join(f" {key}={value}" for key, value in _context.get())
        return True


def setup(role: str, *, debug: bool = False) -> None:
    """Configure the root logger once, from `cli`. Library code never configures logging."""
    _told["debug"] = debug
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(ContextFilter())
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname).1s {role} %(name)s: %(message)s%(facts)s")
    )
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, handlers=[handler])
    for chatty in ("httpx", "httpcore", "uvicorn.error", "uvicorn.access", "aiosqlite", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def set_level(*, debug: bool) -> None:
    """Take in what `--debug` is now. Only where that changed does the level change: one that was
    chosen by name (`log_level`) outlasts every other new setting."""
    if _told.get("debug") == debug:
        return
    _told["debug"] = debug
    root, level = logging.getLogger(), logging.DEBUG if debug else logging.INFO
    if root.level != level:
        root.setLevel(level)
        root.info("log level is now %s", logging.getLevelName(level))
