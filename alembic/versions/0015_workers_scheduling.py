"""workers take new instances, or not"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from gpustack.server.db import types

revision: str = "0015"
down_revision: str | None = "0014"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    with op.batch_alter_table("workers", recreate="never") as workers:
        workers.add_column(
            sa.Column("scheduling", types.Chars(16), nullable=False, server_default="active")
        )
        workers.add_column(
            sa.Column("scheduling_reason", types.Chars(300), nullable=False, server_default="")
        )


def downgrade() -> None:
    with op.batch_alter_table("workers", recreate="never") as workers:
        workers.drop_column("scheduling_reason")
        workers.drop_column("scheduling")
