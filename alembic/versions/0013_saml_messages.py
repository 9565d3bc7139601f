"""messages of SAML identity providers that were taken"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from gpustack.server.db import types

revision: str = "0013"
down_revision: str | None = "0012"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "saml_messages",
        sa.Column("digest", types.Chars(64), nullable=False),
        sa.Column("ends_at", types.Time(), nullable=False),
        sa.Column("request_id", types.Chars(65), nullable=False),
        sa.Column("ticket", types.Chars(64), nullable=True),
        sa.Column("content", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    for column in ("ends_at", "ticket"):
        op.create_index(op.f(f"ix_saml_messages_{column}"), "saml_messages", [column])


def downgrade() -> None:
    op.drop_table("saml_messages")
