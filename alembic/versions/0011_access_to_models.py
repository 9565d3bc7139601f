"""groups of users, and to whom models are granted"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from gpustack.server.db import types

revision: str = "0011"
down_revision: str | None = "0010"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    # Made anew, the table would forget which ids it has given.
    with op.batch_alter_table("models", schema=None, recreate="never") as batch_op:
        # The default is for the rows that are there; new ones always bring values.
        batch_op.add_column(
            sa.Column("access_policy", types.Chars(16), server_default="authed", nullable=False)
        )
    op.create_table(
        "user_groups",
        sa.Column("id", types.whole(), nullable=False),
        sa.Column("name", types.Chars(128), nullable=False),
        sa.Column("description", types.Prose(), nullable=True),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("created_at", types.Time(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name"),
        sqlite_autoincrement=True,
    )
    _pairs("group_members", ("group_id", "user_groups"), ("user_id", "users"))
    _pairs("model_users", ("model_id", "models"), ("user_id", "users"))
    _pairs("model_groups", ("model_id", "models"), ("group_id", "user_groups"))


def _pairs(name: str, *columns: tuple[str, str]) -> None:
    """A table of pairs of ids, each with the table that it is of; found from either side."""
    (first, of_first), (second, of_second) = columns
    op.create_table(
        name,
        sa.Column(first, types.whole(), nullable=False, autoincrement=False),
        sa.Column(second, types.whole(), nullable=False, autoincrement=False),
        sa.ForeignKeyConstraint([first], [f"{of_first}.id"], ondelete="CASCADE"),
        sa.ForeignKeyConstraint([second], [f"{of_second}.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint(first, second),
    )
    with op.batch_alter_table(name, schema=None) as batch_op:
        batch_op.create_index(batch_op.f(f"ix_{name}_{second}"), [second], unique=False)


def downgrade() -> None:
    # The release before lets every user call every model.
    for name in ("model_groups", "model_users", "group_members", "user_groups"):
        op.drop_table(name)
    with op.batch_alter_table("models", schema=None, recreate="never") as batch_op:
        batch_op.drop_column("access_policy")
