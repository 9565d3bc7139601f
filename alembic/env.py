"""How alembic reaches the database. `make migration m="..."` writes a new version."""

from alembic import context
from sqlalchemy import create_engine
from sqlmodel import SQLModel

from gpustack.server.db import tables  # noqa: F401  registers the tables

url = context.config.get_main_option("sqlalchemy.url") or ""
engine = create_engine(url)
with engine.connect() as connection:
    context.configure(
        connection=connection,
        target_metadata=SQLModel.metadata,
        render_as_batch=True,  # SQLite cannot alter most things in place
        compare_type=True,
    )
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
