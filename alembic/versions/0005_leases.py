"""the lease that the leading server holds"""

from collections.abc import Sequence
from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

from gpustack.server.db import types

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    leases = op.create_table(
        "leases",
        sa.Column("name", types.Chars(32), nullable=False),
        sa.Column("holder", types.Chars(64), nullable=False),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.Column("renewed_at", types.Time(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    long_ago = datetime.fromtimestamp(0, UTC)
    op.bulk_insert(leases, [{"name": "control", "holder": "", "token": 0, "renewed_at": long_ago}])


def downgrade() -> None:
    op.drop_table("leases")
