"""what each worker's port shows, as PEM; empty: it speaks no TLS"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from gpustack.server.db import types

revision: str = "0012"
down_revision: str | None = "0011"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    # Made anew, the table would forget which ids it has given.
    with op.batch_alter_table("workers", schema=None, recreate="never") as batch_op:
        # The default is for the rows that are there; new ones always bring values.
        batch_op.add_column(
            sa.Column("certificate", types.Chars(2048), server_default="", nullable=False)
        )


def downgrade() -> None:
    with op.batch_alter_table("workers", schema=None, recreate="never") as batch_op:
        batch_op.drop_column("certificate")
