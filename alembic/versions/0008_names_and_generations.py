"""generations, disabled users, what API keys may do, a worker's ip, indexes of what is counted"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from gpustack.server.db import types

revision: str = "0008"
down_revision: str | None = "0007"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

TABLES = ("users", "credentials")


def upgrade() -> None:
    for table in TABLES:
        with op.batch_alter_table(table, schema=None) as batch_op:
            # The default is for the rows that are there; new ones always bring values.
            batch_op.add_column(
                sa.Column("generation", sa.Integer(), server_default="1", nullable=False)
            )
    with op.batch_alter_table("users", schema=None, recreate="never") as batch_op:
        batch_op.add_column(
            sa.Column("is_active", sa.Boolean(), server_default="1", nullable=False)
        )
    with op.batch_alter_table("credentials", schema=None) as batch_op:
        batch_op.add_column(sa.Column("allowed_model_names", sa.JSON(), nullable=True))
        batch_op.add_column(sa.Column("last_used_at", types.Time(), nullable=True))
    op.execute("ALTER TABLE workers RENAME COLUMN address TO ip")
    op.create_index(op.f("ix_workers_silent"), "workers", ["silent"])
    # It takes the other's place; MySQL wants one of them at any time, for the foreign key.
    op.create_index(
        "ix_model_instances_uses",
        "model_instances",
        ["model_id", "version_id", "deleting", "reported_state", "worker_id"],
    )
    op.drop_index(op.f("ix_model_instances_model_id"), table_name="model_instances")


def downgrade() -> None:
    op.create_index(op.f("ix_model_instances_model_id"), "model_instances", ["model_id"])
    op.drop_index("ix_model_instances_uses", table_name="model_instances")
    op.drop_index(op.f("ix_workers_silent"), table_name="workers")
    op.execute("ALTER TABLE workers RENAME COLUMN ip TO address")
    # Made anew, the tables would forget which ids they have given.
    # The release before would let them do all again.
    op.execute(
        "DELETE FROM credentials WHERE kind IN ('key', 'session') AND (allowed_model_names IS NOT"
        " NULL OR user_id IN (SELECT id FROM users WHERE NOT is_active))"
    )
    op.execute("UPDATE users SET password_hash = '' WHERE NOT is_active")
    with op.batch_alter_table("credentials", schema=None, recreate="never") as batch_op:
        batch_op.drop_column("last_used_at")
        batch_op.drop_column("allowed_model_names")
    with op.batch_alter_table("users", schema=None, recreate="never") as batch_op:
        batch_op.drop_column("is_active")
    for table in TABLES:
        with op.batch_alter_table(table, schema=None, recreate="never") as batch_op:
            batch_op.drop_column("generation")
