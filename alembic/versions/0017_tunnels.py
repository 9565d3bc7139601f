"""how requests get to each worker, and why its port cannot be dialled; empty: it can"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from gpustack.server.db import types

revision: str = "0017"
down_revision: str | None = "0016"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    # Made anew, the table would forget which ids it has given.
    with op.batch_alter_table("workers", schema=None, recreate="never") as batch_op:
        # The defaults are for the rows that are there; new ones always bring values.
        batch_op.add_column(
            sa.Column("proxy_mode", types.Chars(16), server_default="direct", nullable=False)
        )
        batch_op.add_column(
            sa.Column("unreached", types.Chars(255), server_default="", nullable=False)
        )


def downgrade() -> None:
    with op.batch_alter_table("workers", schema=None, recreate="never") as batch_op:
        batch_op.drop_column("unreached")
        batch_op.drop_column("proxy_mode")
