"""workers that are silent beyond the grace period, and what is replaced for it"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from gpustack.server.db import types

revision: str = "0016"
down_revision: str | None = "0015"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

COUNTED = ["model_id", "version_id", "deleting", "reported_state", "worker_id"]


def upgrade() -> None:
    for table in ("workers", "model_instances"):
        with op.batch_alter_table(table, schema=None, recreate="never") as batch_op:
            # The default is for the rows that are there; new ones always bring values.
            batch_op.add_column(sa.Column("lost", sa.Boolean(), server_default="0", nullable=False))
    with op.batch_alter_table("workers", schema=None, recreate="never") as batch_op:
        batch_op.add_column(sa.Column("grace_ends_at", types.Time(), nullable=True))
    # It takes the other's place; MySQL wants one of them at any time, for the foreign key.
    op.create_index(
        "ix_model_instances_counts", "model_instances", [*COUNTED[:3], "lost", *COUNTED[3:]]
    )
    op.drop_index("ix_model_instances_uses", table_name="model_instances")


def downgrade() -> None:
    op.create_index("ix_model_instances_uses", "model_instances", COUNTED)
    op.drop_index("ix_model_instances_counts", table_name="model_instances")
    # Made anew, the tables would forget which ids they have given.
    with op.batch_alter_table("workers", schema=None, recreate="never") as batch_op:
        batch_op.drop_column("grace_ends_at")
    for table in ("model_instances", "workers"):
        with op.batch_alter_table(table, schema=None, recreate="never") as batch_op:
            batch_op.drop_column("lost")
