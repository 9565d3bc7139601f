"""events, the audit log and its chain"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from gpustack.server.db import types

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "events",
        sa.Column("id", types.whole(), nullable=False),
        sa.Column("kind", types.Chars(32), nullable=False),
        sa.Column("object_id", types.whole(), nullable=False),
        sa.Column("name", types.Chars(255), nullable=False),
        sa.Column("type", types.Chars(32), nullable=False),
        sa.Column("message", types.Prose(), nullable=False),
        sa.Column("codes", sa.JSON(), nullable=False),
        sa.Column("by_kind", types.Chars(16), nullable=False),
        sa.Column("by_name", types.Chars(255), nullable=False),
        sa.Column("alike", types.Chars(64), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("first_at", types.Time(), nullable=False),
        sa.Column("last_at", types.Time(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("events", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_events_alike"), ["alike"], unique=False)
        batch_op.create_index(batch_op.f("ix_events_last_at"), ["last_at"], unique=False)
        batch_op.create_index("ix_events_object", ["kind", "object_id"], unique=False)

    op.create_table(
        "audit_log",
        sa.Column("id", types.whole(), autoincrement=False, nullable=False),
        sa.Column("at", types.Time(), nullable=False),
        sa.Column("user_id", types.whole(), nullable=True),
        sa.Column("username", types.Chars(128), nullable=False),
        sa.Column("credential_kind", types.Chars(16), nullable=False),
        sa.Column("credential_name", types.Chars(255), nullable=False),
        sa.Column("peer", types.Chars(255), nullable=False),
        sa.Column("action", types.Chars(16), nullable=False),
        sa.Column("kind", types.Chars(32), nullable=False),
        sa.Column("object_id", types.whole(), nullable=True),
        sa.Column("name", types.Chars(255), nullable=False),
        sa.Column("changed", types.Prose(), nullable=False),
        sa.Column("remark", types.Prose(), nullable=False),
        sa.Column("previous", types.Chars(64), nullable=False),
        sa.Column("hash", types.Chars(64), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    chain = op.create_table(
        "audit_chain",
        sa.Column("id", types.whole(), nullable=False),
        sa.Column("pruned_id", types.whole(), nullable=False),
        sa.Column("pruned_hash", types.Chars(64), nullable=False),
        sa.Column("last_id", types.whole(), nullable=False),
        sa.Column("last_hash", types.Chars(64), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.bulk_insert(
        chain, [{"id": 1, "pruned_id": 0, "pruned_hash": "", "last_id": 0, "last_hash": ""}]
    )


def downgrade() -> None:
    op.drop_table("audit_chain")
    op.drop_table("audit_log")
    op.drop_table("events")
