"""Column types that mean the same on SQLite, PostgreSQL, MySQL and MariaDB.

Migrations import them, so what a name here stands for never changes: what needs another type gets
another name. A database's own types are imported only where that database is used.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import BigInteger, DateTime, Double, Float, Integer, String, Text, TypeDecorator
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeEngine

#: MySQL compares text without regard to case unless told otherwise, and has older character sets.
_BINARY = {"charset": "utf8mb4", "collation": "utf8mb4_bin"}


class Chars(TypeDecorator[str]):
    """At most `length` characters, compared and sorted by their code points: case counts."""

    impl = String
    cache_ok = True

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.length = length

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(String(self.length, collation="C"))
        if dialect.name == "mysql":
            from sqlalchemy.dialects.mysql import VARCHAR

            return dialect.type_descriptor(VARCHAR(self.length, **_BINARY))
        return dialect.type_descriptor(String(self.length))


class Prose(TypeDecorator[str]):
    """Text for people, of any length that makes sense; not to be searched by."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "mysql":
            from sqlalchemy.dialects.mysql import MEDIUMTEXT

            return dialect.type_descriptor(MEDIUMTEXT(**_BINARY))
        return super().load_dialect_impl(dialect)


class Time(TypeDecorator[datetime]):
    """A moment, to the microsecond. Goes in aware of its zone, comes out in UTC.

    Databases without time zones keep UTC.
    """

    impl = DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "mysql":
            from sqlalchemy.dialects.mysql import DATETIME

            return dialect.type_descriptor(DATETIME(fsp=6))
        return dialect.type_descriptor(DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone is nobody's: give one that is aware")
        utc = value.astimezone(UTC)
        return utc if dialect.name == "postgresql" else utc.replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def whole() -> TypeEngine[int]:
    """A whole number of 64 bits, also for ids: SQLite makes such only of what it calls INTEGER."""
    return BigInteger().with_variant(Integer(), "sqlite")


def real() -> TypeEngine[float]:
    """A number of double precision."""
    return Double().with_variant(Float(), "sqlite")
