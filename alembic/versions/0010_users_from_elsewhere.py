"""users of identity providers, known by source, issuer and subject"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from gpustack.server.db import types

revision: str = "0010"
down_revision: str | None = "0009"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    # Made anew, the tables would forget which ids they have given.
    with op.batch_alter_table("users", schema=None, recreate="never") as batch_op:
        # The default is for the rows that are there; new ones always bring values.
        batch_op.add_column(
            sa.Column("source", types.Chars(16), server_default="local", nullable=False)
        )
        batch_op.add_column(sa.Column("avatar_url", types.Prose(), nullable=True))
    with op.batch_alter_table("credentials", schema=None, recreate="never") as batch_op:
        batch_op.add_column(sa.Column("provider_session", sa.JSON(), nullable=True))
    op.create_table(
        "identities",
        sa.Column("id", types.whole(), nullable=False),
        sa.Column("user_id", types.whole(), nullable=False),
        sa.Column("source", types.Chars(16), nullable=False),
        sa.Column("issuer", types.Chars(400), nullable=False),
        sa.Column("subject", types.Chars(320), nullable=False),
        sa.Column("created_at", types.Time(), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("source", "issuer", "subject"),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_identities_user_id"), "identities", ["user_id"])


def downgrade() -> None:
    op.drop_table("identities")
    with op.batch_alter_table("credentials", schema=None, recreate="never") as batch_op:
        batch_op.drop_column("provider_session")
    with op.batch_alter_table("users", schema=None, recreate="never") as batch_op:
        batch_op.drop_column("avatar_url")
        batch_op.drop_column("source")
