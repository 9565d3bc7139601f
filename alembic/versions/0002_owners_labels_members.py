"""whose a change is, labels from administrators, members of instances"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from gpustack.server.db import types

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    with op.batch_alter_table("changes", schema=None) as batch_op:
        batch_op.add_column(sa.Column("user_id", types.whole(), nullable=True))

    # The defaults are for the rows that are there; new ones always bring values.
    with op.batch_alter_table("workers", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("admin_labels", sa.JSON(), server_default=_nothing(), nullable=False)
        )
        batch_op.add_column(
            sa.Column("generation", sa.Integer(), server_default="1", nullable=False)
        )

    op.create_table(
        "members",
        sa.Column("id", types.whole(), nullable=False),
        sa.Column("instance_id", types.whole(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("worker_id", types.whole(), nullable=False),
        sa.Column("claim", sa.JSON(), nullable=False),
        sa.Column("ports", sa.JSON(), nullable=False),
        sa.Column("reported_state", types.Chars(255), nullable=True),
        sa.Column("state_message", types.Prose(), nullable=False),
        sa.Column("observed_generation", sa.Integer(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=True),
        sa.Column("restart_count", sa.Integer(), nullable=False),
        sa.Column("download_progress", types.real(), nullable=True),
        sa.ForeignKeyConstraint(["instance_id"], ["model_instances.id"], ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("instance_id", "rank"),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("members", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_members_worker_id"), ["worker_id"], unique=False)


def _nothing() -> "str | sa.TextClause":
    """The default of a JSON column: MySQL takes no literal there, and SQLite no expression."""
    return sa.text("('{}')") if op.get_bind().dialect.name == "mysql" else "{}"


def downgrade() -> None:
    with op.batch_alter_table("members", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_members_worker_id"))

    op.drop_table("members")
    # Made anew, the table would forget which ids it has given.
    with op.batch_alter_table("workers", schema=None, recreate="never") as batch_op:
        batch_op.drop_column("generation")
        batch_op.drop_column("admin_labels")

    with op.batch_alter_table("changes", schema=None, recreate="never") as batch_op:
        batch_op.drop_column("user_id")
