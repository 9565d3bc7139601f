"""From text and YAML to typed values, and back to JSON for the roles."""

import ipaddress
import json
import math
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from gpustack.config.option import Json, Option, PortRange, Reserved
from gpustack.lib.net import without_credentials
from gpustack.lib.secrets import Secret

#: What stands for a secret.
HIDDEN = "(hidden)"
#: Far above any machine: a number beyond it is in the wrong unit.
MOST_RESERVED_GIB = 1e6
#: Labels of letters, digits, - and _, joined by dots; the last one is no number.
_HOST_NAME = re.compile(
    r"(?=.{1,253}\Z)(?:(?!-)[A-Za-z0-9_-]{1,63}(?<!-)\.)*(?!-|\d+\Z)[A-Za-z0-9_-]{1,63}(?<!-)\Z"
)
#: Older names of the keys of --system-reserved.
_OLD_RESERVED = {"memory": "ram", "gpu_memory": "vram"}
_ORIGIN = re.compile(r"https?://(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d{1,5})?")
#: RFC 9110 section 5.6.2.
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d{1,7}(?:\.\d{1,3})?)([smhd]?)", re.ASCII)
#: Databases by URL scheme; those with a host need one.
_DATABASES = {"sqlite", "embedded", "postgresql", "mysql"}
#: The parameter that names a Unix socket in the host's place.
_SOCKETS = {"postgresql": "host", "mysql": "unix_socket"}
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


def outdated(kind: str, raw: Any) -> list[str]:
    """What in a value that `parse` has taken should be written otherwise, as sentences."""
    if kind != "reserved":
        return []
    return [
        f"key {old} is deprecated: write {new}"
        for old, new in _OLD_RESERVED.items()
        if old in _json(raw)
    ]


def shown(raw: Any) -> str:
    """`raw` as an error quotes it: printable, and not too long to read."""
    text = _SHORT.repr(raw)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def setting_shown(known: Option, value: Any) -> Any:
    """The value of an option as anybody may see it, as JSON: no secret, and no URL's password."""
    if value is None:
        return None
    if known.secret:
        return HIDDEN
    if known.kind == "url":
        return without_credentials(value)
    if known.kind == "duration":
        return _duration_shown(value)
    return to_json(value)


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
    if isinstance(value, MappingProxyType):
        return dict(value)
    return value


def _text(raw: Any) -> str:
    if isinstance(raw, bool) or not isinstance(raw, str | int | float):
        raise ValueError(f"want text, got {shown(raw)}")
    return str(raw)


def _line(raw: Any) -> str:
    """Text that names something: it goes into logs, headers and tables."""
    text = _text(raw).strip()
    if not text.isprintable():
        raise ValueError(f"want one line of text, got {shown(raw)}")
    return text


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
    text = _text(raw)
    if "\0" in text:
        raise ValueError(f"want a path, got {shown(raw)}")
    try:
        return Path(text).expanduser().absolute()
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
        right = (
            parts.scheme in {"http", "https"}
            and parts.hostname
            and parts.port != 0
            and not re.search(r"\s|[\x00-\x1f\x7f]", url)
        )
    except ValueError:
        right = False
    if not right:
        got = shown(without_credentials(str(raw)))
        raise ValueError(f"want a URL such as http://server:80, got {got}")
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


def _labels(raw: Any) -> tuple[str, ...]:
    if isinstance(raw, dict):
        raw = [f"{_text(key)}={_text(value)}" for key, value in raw.items()]
    labels = _list(raw)
    for label in labels:
        if not label.partition("=")[0] or "=" not in label:
            raise ValueError(f"want key=value, got {shown(label)}")
    return labels


def _arguments(raw: Any) -> tuple[str, ...]:
    """A space may stand in a value; after an option, or before one, two came in one."""
    arguments = _list(raw)
    for argument in arguments:
        if re.search(r"\s--?[A-Za-z]|^-[^=\s]*\s", argument):
            raise ValueError(
                f"a shell would split {shown(argument)}: give each argument by itself, the option "
                "repeated"
            )
    return arguments


def _origins(raw: Any) -> tuple[str, ...]:
    """As browsers write them in Origin."""
    origins = tuple(origin.strip().rstrip("/").lower() for origin in _list(raw))
    for origin in origins:
        if origin not in {"*", "null"} and not _ORIGIN.fullmatch(origin):
            raise ValueError(
                f"want * or an origin such as https://app.example:8443, got {shown(origin)}"
            )
    return origins


def _tokens(raw: Any) -> tuple[str, ...]:
    """Words that may stand in a header: names of headers and methods."""
    tokens = _list(raw)
    for token in tokens:
        if not _TOKEN.fullmatch(token):
            raise ValueError(f"want words such as X-Request-Id, got {shown(token)}")
    return tokens


def _networks(raw: Any) -> tuple[str, ...]:
    networks = _list(raw)
    for network in networks:
        try:
            ipaddress.ip_network(network)
        except ValueError:
            raise ValueError(
                f"want an address or network such as 10.0.0.0/8, got {shown(network)}"
            ) from None
    return networks


def _duration(raw: Any) -> float:
    """Seconds."""
    if isinstance(raw, int | float) and not isinstance(raw, bool) and math.isfinite(raw):
        seconds = float(raw)
    else:
        found = _DURATION.fullmatch(str(raw).strip())
        seconds = float(found[1]) * _UNITS_S[found[2] or "s"] if found else -1.0
    if seconds < 0:
        raise ValueError(f"want a time such as 30s, 5m or 1h, got {shown(raw)}")
    return seconds


def _duration_shown(seconds: float) -> str:
    whole = [unit for unit in ("d", "h", "m") if seconds and seconds % _UNITS_S[unit] == 0]
    unit = next(iter(whole), "s")
    return f"{seconds / _UNITS_S[unit]:g}{unit}"


def _fingerprint(raw: Any) -> str:
    """As `lib.trust.fingerprint` writes it."""
    found = _text(raw).strip().lower()
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", found):
        raise ValueError(f"want sha256: and 64 hexadecimal digits, got {shown(raw)}")
    return found


def _database(raw: Any) -> Secret:
    """The text is never quoted: a password may stand in it."""
    url = raw.strip() if isinstance(raw, str) else ""
    scheme, separator, rest = url.partition("://")
    wanted = (
        "want sqlite:///PATH, postgresql://user:password@host:port/db, "
        "mysql://user:password@host:port/db or embedded://"
    )
    if scheme not in _DATABASES or not separator:
        got = f", got scheme {shown(scheme)}" if separator else ""
        raise ValueError(f"{wanted}{got}")
    if scheme == "embedded" and rest:
        raise ValueError("want embedded:// and nothing after it")
    if scheme == "sqlite" and (not rest.startswith("/") or len(rest) < 2):
        raise ValueError("want sqlite:///PATH, with three slashes before the path")
    if scheme in {"postgresql", "mysql"}:
        try:
            parts = urlsplit(url)
            socket = dict(parse_qsl(parts.query)).get(_SOCKETS[scheme], "")
            right = parts.hostname or socket.startswith("/")
            right = right and len(parts.path) > 1 and parts.port != 0
        except ValueError:
            right = False
        if not right:
            raise ValueError(f"want {scheme}://user:password@host:port/db, with a host and a db")
    return Secret(url)


def _json(raw: Any) -> Json:
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError):
            raise ValueError(f'want JSON such as {{"key": true}}, got {shown(raw)}') from None
    if not isinstance(raw, dict):
        raise ValueError(f'want a JSON object such as {{"key": true}}, got {shown(raw)}')
    try:
        json.dumps(raw)
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"want what JSON can say, got {shown(raw)}") from None
    return MappingProxyType(raw)


def _reserved(raw: Any) -> Reserved:
    wanted = 'want GiB, at most 1000000, as JSON such as {"ram": 2, "vram": 1}'
    try:
        said = _json(raw)
        given = {_OLD_RESERVED.get(key, key): value for key, value in said.items()}
    except ValueError:
        said, given = {}, {"": 0}
    if len(given) < len(said):
        raise ValueError("ram and memory, or vram and gpu_memory, are two names of one: give one")
    if not set(given) <= {"ram", "vram"}:
        raise ValueError(f"{wanted}, got {shown(raw)}")
    numbers = {"ram": 2, "vram": 1} | given
    if not all(
        isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n <= MOST_RESERVED_GIB
        for n in numbers.values()
    ):
        raise ValueError(f"{wanted}, got {shown(raw)}")
    return Reserved(**numbers)


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "str": _text,
    "name": _line,
    "secret": lambda raw: Secret(_text(raw)),
    "bool": _bool,
    "count": _count,
    "port": _port,
    "ports": _ports,
    "path": _path,
    "host": _host,
    "url": _url,
    "list": _list,
    "labels": _labels,
    "arguments": _arguments,
    "networks": _networks,
    "origins": _origins,
    "tokens": _tokens,
    "duration": _duration,
    "database": _database,
    "fingerprint": _fingerprint,
    "json": _json,
    "reserved": _reserved,
}
