"""How alembic reaches the database. `make migration m="..."` writes a new version."""

from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy import Connection, Double, Integer, create_engine, event
from sqlmodel import SQLModel

from gpustack.server.db import (
    tables,  # noqa: F401  registers the tables
    types,
)

#: How migrations write the types that mean the same on every database.
PORTABLE = {
    types.Chars: "types.Chars({0.length})",
    types.Prose: "types.Prose()",
    types.Time: "types.Time()",
}


def portable(kind: str, item: Any, autogen: AutogenContext) -> str | Literal[False]:
    """The source of a column type, where it is one of ours."""
    written = PORTABLE.get(type(item)) if kind == "type" else None
    if kind == "type" and isinstance(getattr(item, "_variant_mapping", {}).get("sqlite"), Integer):
        written = "types.whole()"
    if kind == "type" and isinstance(item, Double):
        written = "types.real()"
    if written is None:
        return False
    autogen.imports.add("from gpustack.server.db import types")
    return written.format(item)


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=SQLModel.metadata,
        render_as_batch=True,  # SQLite cannot alter most things in place
        compare_type=True,
        render_item=portable,
        transactional_ddl=connection.dialect.name != "mysql",
    )
    with context.begin_transaction():
        context.run_migrations()


def leave_transactions_to_us(connection: Any, _: object) -> None:
    """Else the driver commits before each CREATE TABLE, and a crash leaves half a schema."""
    connection.isolation_level = None


def begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def run_on_file() -> None:
    """Other connections of ours check foreign keys; tables could not be made anew with that."""
    engine = create_engine(
        context.config.get_main_option("sqlalchemy.url") or "", connect_args={"timeout": 60}
    )
    event.listen(engine, "connect", leave_transactions_to_us)
    event.listen(engine, "begin", begin)
    with engine.connect() as connection:
        run(connection)
    engine.dispose()


if (given := context.config.attributes.get("connection")) is not None:
    run(given)
else:
    run_on_file()
