"""From what drivers raise to errors of ours. What is not in these tables is a bug and stays one."""

from sqlalchemy.exc import DataError, DBAPIError

from gpustack.errors import Contended, DatabaseAway, GPUStackError, Invalid
from gpustack.server.db.url import DatabaseUrl, Kind

#: SQLSTATE of PostgreSQL: serialization failure, deadlock, lock not available in time.
_PG_CONTENDED = {"40001", "40P01", "55P03"}
#: Connection, resources, operator intervention, system; a standby takes no writes; logins refused.
_PG_AWAY_CLASSES = {"08", "53", "57", "58", "28"}
_PG_AWAY = {"25006", "3D000", "42501", "XX001", "XX002", "25P03"}
_PG_DATA_CLASS = "22"
#: MySQL: lock wait time-out, deadlock, NOWAIT; MariaDB: the record changed since it was read.
_MY_CONTENDED = {1205, 1213, 3572, 1020}
#: MySQL and MariaDB: no connection, no login, no room, no writes, going away.
_MY_AWAY = {
    1021, 1030, 1040, 1041, 1044, 1045, 1049, 1053, 1077, 1079, 1114, 1129, 1130, 1152, 1184, 1203,
    1142, 1226, 1290, 1317, 1698, 1836, 1927, 2002, 2003, 2005, 2006, 2013, 2055, 3024, 4031,
}  # fmt: skip
#: SQLite, by the first two words of the error's name.
_LITE_CONTENDED = {"SQLITE_BUSY", "SQLITE_LOCKED"}
_LITE_AWAY = {
    "SQLITE_CANTOPEN", "SQLITE_CORRUPT", "SQLITE_FULL", "SQLITE_IOERR", "SQLITE_NOMEM",
    "SQLITE_NOTADB", "SQLITE_PERM", "SQLITE_READONLY",
}  # fmt: skip


def failure(error: BaseException, wrapped: object, url: DatabaseUrl) -> GPUStackError | None:
    """The error of ours that a driver's error is; None: it is none, or a constraint speaks.

    Args:
        error: as the driver raised it.
        wrapped: SQLAlchemy's error for it, where it has one.
    """
    if isinstance(error, OSError):  # time-outs too
        return away(url, error)
    if not isinstance(wrapped, DBAPIError):
        return None
    contended, gone = _judged(error, url.kind)
    if contended:
        return Contended()
    if gone or wrapped.connection_invalidated:
        return away(url, error)
    if isinstance(wrapped, DataError) or _sqlstate(error).startswith(_PG_DATA_CLASS):
        return Invalid("a value is longer or larger than the database has room for")
    return None


def away(url: DatabaseUrl, why: BaseException | str) -> DatabaseAway:
    """The database cannot be used; the sentence says why, in the database's or system's words."""
    return DatabaseAway(f"the database ({url.shown}) cannot be used: {_words(why)}")


def _judged(error: BaseException, kind: Kind) -> tuple[bool, bool]:
    """Whether another transaction was in the way, and whether the database cannot be used."""
    if kind is Kind.SQLITE:
        name = "_".join(str(getattr(error, "sqlite_errorname", "")).split("_")[:2])
        return name in _LITE_CONTENDED, name in _LITE_AWAY
    if kind is Kind.POSTGRESQL:
        state = _sqlstate(error)
        return state in _PG_CONTENDED, state in _PG_AWAY or state[:2] in _PG_AWAY_CLASSES
    number = error.args[0] if error.args else None
    return number in _MY_CONTENDED, number in _MY_AWAY


def _sqlstate(error: BaseException) -> str:
    return str(getattr(error, "sqlstate", None) or "")


def _words(why: BaseException | str) -> str:
    """The driver's own sentence, on one line. Drivers quote no password, SQLAlchemy would."""
    if isinstance(why, TimeoutError) and not str(why):
        return "it does not answer in time"
    if isinstance(why, OSError) and why.strerror:
        return why.strerror
    said = why.args[-1] if isinstance(why, BaseException) and why.args else why
    return " ".join(str(said).split()) or type(why).__name__
