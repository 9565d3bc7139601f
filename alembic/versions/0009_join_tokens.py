"""whether a join token lets more than one worker in"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0009"
down_revision: str | None = "0008"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    # Made anew, the table would forget which ids it has given.
    with op.batch_alter_table("credentials", schema=None, recreate="never") as batch_op:
        # The default is for the rows that are there; new ones always bring values.
        batch_op.add_column(sa.Column("reusable", sa.Boolean(), server_default="0", nullable=False))


def downgrade() -> None:
    op.execute("DELETE FROM credentials WHERE kind = 'join'")  # unknown to the release before
    with op.batch_alter_table("credentials", schema=None, recreate="never") as batch_op:
        batch_op.drop_column("reusable")
