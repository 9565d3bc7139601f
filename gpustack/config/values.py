"""From text and YAML to typed values, and back to JSON for the roles."""

import ipaddress
import json
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gpustack.config.options import PortRange, Reserved
from gpustack.lib.secrets import Secret

#: Far above any machine: a number beyond it is in the wrong unit.
MOST_RESERVED_GIB = 1e6
#: Labels of letters, digits, - and _, joined by dots; the last one is no number.
_HOST_NAME = re.compile(
    r"(?=.{1,253}\Z)(?:(?!-)[A-Za-z0-9_-]{1,63}(?<!-)\.)*(?!-|\d+\Z)[A-Za-z0-9_-]{1,63}(?<!-)\Z"
)
#: The value in an error is cut to this many characters.
SHOWN = 40
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = SHOWN
_SHORT.maxlevel = 2


def parse(kind: str, raw: Any) -> Any:
    """The value of an option of `kind` from text or from what YAML made of it.

    Raises:
        ValueError: it is none; the message says what would be right.
    """
    if isinstance(raw, str) and not raw.strip():
        raise ValueError("want a value, got empty text")
    return _PARSERS[kind](raw)


def shown(raw: Any) -> str:
    """`raw` as an error quotes it: printable, and not too long to read."""
    text = _SHORT.repr(raw)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


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
        raise ValueError(f"want text, got {shown(raw)}")
    return str(raw)


def _bool(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    word = str(raw).strip().lower()
    if word in {"1", "true", "yes", "on"}:
        return True
    if word in {"0", "false", "no", "off"}:
        return False
    raise ValueError(f"want true or false, got {shown(raw)}")


def _count(raw: Any) -> int:
    number = _digits(raw)
    if number < 1:
        raise ValueError(f"want a whole number from 1 to 99999, got {shown(raw)}")
    return number


def _port(raw: Any) -> int:
    number = _digits(raw)
    if not 1 <= number <= 65535:
        raise ValueError(f"want a port from 1 to 65535, got {shown(raw)}")
    return number


def _digits(raw: Any) -> int:
    """The number that at most five ASCII digits say; -1 for anything else."""
    if isinstance(raw, bool) or not isinstance(raw, str | int):
        return -1
    if isinstance(raw, int):
        return raw if raw < 100_000 else -1
    text = raw.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 5 else -1


def _ports(raw: Any) -> PortRange:
    first, dash, last = str(raw).strip().partition("-")
    try:
        found = PortRange(_port(first), _port(last))
    except ValueError:
        dash = ""
        found = PortRange(1, 1)
    if not dash or found.first > found.last:
        raise ValueError(
            f"want FIRST-LAST, both from 1 to 65535, such as 40000-40063, got {shown(raw)}"
        )
    return found


def _path(raw: Any) -> Path:
    try:
        return Path(_text(raw)).expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"want a path, got {shown(raw)}, a home that nobody here has") from None


def _host(raw: Any) -> str:
    host = _text(raw).strip()
    if not _HOST_NAME.match(host):
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise ValueError(f"want an IP address or a host name, got {shown(raw)}") from None
    return host


def _url(raw: Any) -> str:
    url = _text(raw).strip().rstrip("/")
    try:
        parts = urlsplit(url)
        # The port raises when it is none.
        right = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        right = False
    if not right:
        raise ValueError(f"want a URL such as http://server:80, got {shown(raw)}")
    return url


def _list(raw: Any) -> tuple[str, ...]:
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError):
            raise ValueError(f'want a JSON list such as ["a", "b"], got {shown(raw)}') from None
    if not isinstance(raw, list | tuple) or not all(isinstance(item, str) for item in raw):
        raise ValueError(f"want a list of texts, got {shown(raw)}")
    return tuple(raw)


def _reserved(raw: Any) -> Reserved:
    wanted = 'want GiB, at most 1000000, as JSON such as {"ram": 2, "vram": 1}'
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError):
            raise ValueError(f"{wanted}, got {shown(raw)}") from None
    if not isinstance(raw, dict) or not set(raw) <= {"ram", "vram"}:
        raise ValueError(f"{wanted}, got {shown(raw)}")
    numbers = {"ram": 2, "vram": 1} | raw
    if not all(
        isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n <= MOST_RESERVED_GIB
        for n in numbers.values()
    ):
        raise ValueError(f"{wanted}, got {shown(raw)}")
    return Reserved(**numbers)


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "str": _text,
    "secret": lambda raw: Secret(_text(raw)),
    "bool": _bool,
    "count": _count,
    "port": _port,
    "ports": _ports,
    "path": _path,
    "host": _host,
    "url": _url,
    "list": _list,
    "reserved": _reserved,
}
