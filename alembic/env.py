"""How alembic reaches the database. `make migration m="..."` writes a new version."""

from typing import Any, Literal

from alembic import context
from sqlalchemy import Connection, create_engine, event
from sqlmodel import AutoString, SQLModel

from gpustack.server.db import tables  # noqa: F401  registers the tables


def plain_strings(kind: str, item: object, _: object) -> str | Literal[False]:
    """SQLModel's string type is SQLAlchemy's; migrations need not know the former."""
    if kind == "type" and isinstance(item, AutoString):
        return f"sa.String(length={item.length})" if item.length else "sa.String()"
    return False


url = context.config.get_main_option("sqlalchemy.url") or ""
engine = create_engine(url)


@event.listens_for(engine, "connect")
def _leave_transactions_to_us(connection: Any, _: object) -> None:
    """Else the driver commits before each CREATE TABLE, and a crash leaves half a schema."""
    connection.isolation_level = None


@event.listens_for(engine, "begin")
def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


with engine.connect() as connection:
    context.configure(
        connection=connection,
        target_metadata=SQLModel.metadata,
        render_as_batch=True,  # SQLite cannot alter most things in place
        compare_type=True,
        render_item=plain_strings,
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
