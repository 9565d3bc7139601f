"""The database's clock, the one that several servers share."""

from datetime import datetime
from typing import Any

from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from gpustack.server.db import types


class clock(FunctionElement[datetime]):
    """The moment at which the database runs the statement; not that of the transaction's begin."""

    type = types.Time()
    inherit_cache = True


@compiles(clock, "postgresql")
def _postgresql(*_: Any, **__: Any) -> str:
    return "clock_timestamp()"


@compiles(clock, "mysql")
def _mysql(*_: Any, **__: Any) -> str:
    return "UTC_TIMESTAMP(6)"


@compiles(clock, "sqlite")
def _sqlite(*_: Any, **__: Any) -> str:
    return "strftime('%Y-%m-%d %H:%M:%f000', 'now')"  # as the driver writes times
