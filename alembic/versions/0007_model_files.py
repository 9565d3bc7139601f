"""model files on workers"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from gpustack.server.db import types

revision: str = "0007"
down_revision: str | None = "0006"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "model_files",
        sa.Column("id", types.whole(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("worker_id", types.whole(), nullable=False),
        sa.Column("source", types.Chars(32), nullable=False),
        sa.Column("huggingface_repo_id", types.Chars(255), nullable=True),
        sa.Column("huggingface_filename", types.Chars(1024), nullable=True),
        sa.Column("local_path", types.Chars(1024), nullable=True),
        sa.Column("source_digest", types.Chars(64), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("reported_state", types.Chars(16), nullable=True),
        sa.Column("state_message", types.Prose(), nullable=False),
        sa.Column("observed_generation", sa.Integer(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=True),
        sa.Column("download_progress", types.real(), nullable=True),
        sa.Column("resolved_paths", sa.JSON(), nullable=False),
        sa.Column("deleting", sa.Boolean(), nullable=False),
        sa.Column("created_at", types.Time(), nullable=False),
        sa.Column("updated_at", types.Time(), nullable=False),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("worker_id", "source_digest"),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("model_files", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_model_files_revision"), ["revision"], unique=False)


def downgrade() -> None:
    op.drop_table("model_files")
