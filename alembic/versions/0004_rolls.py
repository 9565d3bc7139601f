"""what a roll remembers: the version to go back to, and why it stands still"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from gpustack.server.db import types

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    with op.batch_alter_table("models", schema=None) as batch_op:
        # The default is for the rows that are there; new ones always bring values.
        batch_op.add_column(
            sa.Column("rollout_message", types.Chars(1000), server_default="", nullable=False)
        )

    with op.batch_alter_table("model_instances", schema=None) as batch_op:
        batch_op.add_column(sa.Column("fallback_version_id", types.whole(), nullable=True))


def downgrade() -> None:
    # Made anew, the tables would forget which ids they have given.
    with op.batch_alter_table("model_instances", schema=None, recreate="never") as batch_op:
        batch_op.drop_column("fallback_version_id")

    with op.batch_alter_table("models", schema=None, recreate="never") as batch_op:
        batch_op.drop_column("rollout_message")
