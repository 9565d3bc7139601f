"""What `--database-url` means: which database, how its driver is told, how people read it.

`embedded://` is resolved before: by then it is a PostgreSQL behind a socket of ours.
"""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from gpustack.errors import SettingsError


class Kind(StrEnum):
    SQLITE = "sqlite"
    POSTGRESQL = "postgresql"
    MYSQL = "mysql"  # and MariaDB


@dataclass(frozen=True)
class DatabaseUrl:
    """A database, and what its driver needs to connect.

    Attributes:
        shown: for people; without user and password.
        path: of an SQLite file.
        driver: the driver's arguments. A password may be among them: never to be shown.
    """

    kind: Kind
    shown: str
    path: Path = field(default_factory=Path)
    driver: Mapping[str, Any] = field(default_factory=dict, repr=False)


#: Parameters that asyncpg takes from a URL, as libpq names them.
_POSTGRESQL = {
    "host", "port", "dbname", "user", "password", "passfile", "application_name",
    "target_session_attrs", "sslmode", "sslrootcert", "sslcert", "sslkey", "sslpassword", "sslcrl",
    "sslnegotiation", "ssl_min_protocol_version", "ssl_max_protocol_version",
}  # fmt: skip
#: Parameters of a MySQL URL, as its own tools name their options; - and _ are one.
_MYSQL = {"unix_socket", "ssl_mode", "ssl_ca", "ssl_cert", "ssl_key"}
#: Ours for both: all text is UTF-8, and time-outs are set elsewhere.
_COMMON = {"charset", "client_encoding", "connect_timeout"}
_UTF8 = {"utf8", "utf8mb4", "utf-8", "unicode"}
_TLS_MODES = ("DISABLED", "REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY")


def parse(url: str) -> DatabaseUrl:
    """What `url` names: sqlite:///PATH, postgresql://… or mysql://….

    Raises:
        SettingsError: a parameter is unknown, or a file that one names cannot be read.
    """
    if url.startswith("sqlite:///"):
        path = Path(url.removeprefix("sqlite:///"))
        return DatabaseUrl(Kind.SQLITE, str(path), path)
    parts = urlsplit(url)
    query = {key: value for key, value in parse_qsl(parts.query, keep_blank_values=True)}
    kind = Kind(parts.scheme)
    if kind is Kind.MYSQL:
        query = {key.lower().replace("-", "_"): value for key, value in query.items()}
    _check(kind, query)
    query = {key: value for key, value in query.items() if key not in _COMMON}
    return _postgresql(parts, query) if kind is Kind.POSTGRESQL else _mysql(parts, query)


def _check(kind: Kind, query: Mapping[str, str]) -> None:
    known = _POSTGRESQL if kind is Kind.POSTGRESQL else _MYSQL
    unknown = query.keys() - known - _COMMON
    if unknown:
        wanted = ", ".join(sorted(known | _COMMON))
        raise SettingsError(
            f"--database-url: unknown parameter {', '.join(sorted(unknown))}; want some of {wanted}"
        )
    for key in ("charset", "client_encoding"):
        if query.get(key, "utf8").lower() not in _UTF8:
            raise SettingsError(f"--database-url: {key}: all text is UTF-8, want utf8mb4 or none")


def _postgresql(parts: SplitResult, query: dict[str, str]) -> DatabaseUrl:
    # libpq's form, which asyncpg reads by itself.
    dsn = parts._replace(query=urlencode(query, quote_via=quote)).geturl()
    place = query.get("host") or parts.hostname or "localhost"
    shown = place if place.startswith("/") else f"{_bracketed(place)}:{parts.port or 5432}"
    return DatabaseUrl(Kind.POSTGRESQL, f"PostgreSQL at {shown}", driver={"dsn": dsn})


def _mysql(parts: SplitResult, query: dict[str, str]) -> DatabaseUrl:
    socket = query.get("unix_socket")
    driver: dict[str, Any] = {
        "host": parts.hostname,
        "port": parts.port or 3306,
        "user": unquote(parts.username or ""),
        "password": unquote(parts.password or "").encode(),  # as text it would have to be Latin-1
        "database": unquote(parts.path.lstrip("/")),
        "unix_socket": socket,
        "ssl": _tls(query),
        "charset": "utf8mb4",
    }
    shown = socket or f"{_bracketed(parts.hostname or '')}:{parts.port or 3306}"
    return DatabaseUrl(Kind.MYSQL, f"MySQL at {shown}", driver=driver)


def _tls(query: Mapping[str, str]) -> ssl.SSLContext | None:
    """How MySQL's own tools read these options; none given is no TLS."""
    given = query.get("ssl_ca")
    mode = query.get("ssl_mode", "VERIFY_CA" if given else "DISABLED").upper()
    if mode not in _TLS_MODES:
        raise SettingsError(f"--database-url: ssl-mode: want one of {', '.join(_TLS_MODES)}")
    if mode == "DISABLED":
        return None
    try:
        context = ssl.create_default_context(cafile=given)
        if "ssl_cert" in query:
            context.load_cert_chain(query["ssl_cert"], query.get("ssl_key"))
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(
            f"--database-url: ssl-ca, ssl-cert or ssl-key cannot be used: {error}"
        ) from None
    context.check_hostname = mode == "VERIFY_IDENTITY"
    context.verify_mode = ssl.CERT_NONE if mode == "REQUIRED" else ssl.CERT_REQUIRED
    return context


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
