"""From text and YAML to typed values, and back to JSON for the roles."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gpustack.config.options import PortRange, Reserved
from gpustack.lib.secrets import Secret


def parse(kind: str, raw: Any) -> Any:
    """The value of an option of `kind` from text or from what YAML made of it.

    Raises:
        ValueError: it is none; the message says what would be right.
    """
    return _PARSERS[kind](raw)


def to_json(value: Any) -> Any:
    """`value` as JSON that `parse` reads back. Secrets are revealed: it goes to a pipe."""
    if isinstance(value, Secret):
        return value.reveal()
    if isinstance(value, Path | PortRange):
        return str(value)
    if isinstance(value, Reserved):
        return value._asdict()
    if isinstance(value, tuple):
        return list(value)
    return value


def _text(raw: Any) -> str:
    if isinstance(raw, bool) or not isinstance(raw, str | int | float):
        raise ValueError(f"want text, got {raw!r}")
    return str(raw)


def _bool(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    word = str(raw).strip().lower()
    if word in {"1", "true", "yes", "on"}:
        return True
    if word in {"0", "false", "no", "off", ""}:
        return False
    raise ValueError(f"want true or false, got {raw!r}")


def _count(raw: Any) -> int:
    text = str(raw).strip()
    if isinstance(raw, bool) or not text.isdigit() or int(text) < 1:
        raise ValueError(f"want a whole number above 0, got {raw!r}")
    return int(text)


def _port(raw: Any) -> int:
    text = str(raw).strip()
    if isinstance(raw, bool) or not text.isdigit() or not 1 <= int(text) <= 65535:
        raise ValueError(f"want a port from 1 to 65535, got {raw!r}")
    return int(text)


def _ports(raw: Any) -> PortRange:
    first, dash, last = str(raw).strip().partition("-")
    try:
        found = PortRange(_port(first), _port(last))
    except ValueError:
        dash = ""
        found = PortRange(1, 1)
    if not dash or found.first > found.last:
        raise ValueError(f"want FIRST-LAST, both from 1 to 65535, such as 40000-40063, got {raw!r}")
    return found


def _path(raw: Any) -> Path:
    return Path(_text(raw)).expanduser().absolute()


def _url(raw: Any) -> str:
    url = _text(raw).rstrip("/")
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(f"want a URL such as http://server:80, got {raw!r}")
    return url


def _list(raw: Any) -> tuple[str, ...]:
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except ValueError:
            raise ValueError(f'want a JSON list such as ["a", "b"], got {raw!r}') from None
    if not isinstance(raw, list | tuple) or not all(isinstance(item, str) for item in raw):
        raise ValueError(f"want a list of texts, got {raw!r}")
    return tuple(raw)


def _reserved(raw: Any) -> Reserved:
    wanted = 'want GiB as JSON, such as {"ram": 2, "vram": 1}'
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except ValueError:
            raise ValueError(f"{wanted}, got {raw!r}") from None
    if not isinstance(raw, dict) or not set(raw) <= {"ram", "vram"}:
        raise ValueError(f"{wanted}, got {raw!r}")
    numbers = {"ram": 2, "vram": 1} | raw
    if not all(
        isinstance(n, int | float) and not isinstance(n, bool) and n >= 0 for n in numbers.values()
    ):
        raise ValueError(f"{wanted}, got {raw!r}")
    return Reserved(**numbers)


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "str": _text,
    "secret": lambda raw: Secret(_text(raw)),
    "bool": _bool,
    "count": _count,
    "port": _port,
    "ports": _ports,
    "path": _path,
    "url": _url,
    "list": _list,
    "reserved": _reserved,
}
