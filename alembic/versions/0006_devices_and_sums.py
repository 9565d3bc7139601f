"""devices as rows, usage by the hour, and how busy the cluster was"""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

from gpustack.server.db import types

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    devices = op.create_table(
        "devices",
        sa.Column("id", types.whole(), nullable=False),
        sa.Column("worker_id", types.whole(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("index", sa.Integer(), nullable=False),
        sa.Column("name", types.Chars(255), nullable=False),
        sa.Column("vendor", types.Chars(255), nullable=False),
        sa.Column("type", types.Chars(255), nullable=False),
        sa.Column("uuid", types.Chars(255), nullable=False),
        sa.Column("memory_total_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("worker_id", "position"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "load_samples",
        sa.Column("minute", types.whole(), autoincrement=False, nullable=False),
        sa.Column("cpu", types.real(), nullable=True),
        sa.Column("ram", types.real(), nullable=True),
        sa.Column("gpu", types.real(), nullable=True),
        sa.Column("vram", types.real(), nullable=True),
        sa.PrimaryKeyConstraint("minute"),
    )
    hours = op.create_table(
        "usage_hours",
        sa.Column("id", types.whole(), nullable=False),
        sa.Column("hour", types.whole(), nullable=False),
        sa.Column("model_id", types.whole(), nullable=False),
        sa.Column("model", types.Chars(255), nullable=False),
        sa.Column("user_id", types.whole(), nullable=False),
        sa.Column("credential_id", types.whole(), nullable=False),
        sa.Column("operation", types.Chars(64), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("failed", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("hour", "model_id", "user_id", "credential_id", "operation"),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("usage", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_usage_started_at"), ["started_at"], unique=False)
    # The defaults are for the rows that are there; new ones always bring values.
    with op.batch_alter_table("workers", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("devices_used", sa.JSON(), server_default=_nothing(), nullable=False)
        )
        batch_op.add_column(sa.Column("gpu_percent", types.real(), nullable=True))
        batch_op.add_column(
            sa.Column("vram_used_bytes", sa.BigInteger(), server_default="0", nullable=False)
        )
    _fill(devices, hours)


def _nothing() -> "str | sa.TextClause":
    """The default of a JSON column: MySQL takes no literal there, and SQLite no expression."""
    return sa.text("('[]')") if op.get_bind().dialect.name == "mysql" else "[]"


def _fill(devices: sa.Table, hours: sa.Table) -> None:
    """What the new tables would hold by now."""
    connection = op.get_bind()
    workers = sa.table("workers", sa.column("id"), sa.column("facts", sa.JSON()))
    rows = connection.execute(sa.select(workers)).all()
    found = [
        _device(worker_id, position, device)
        for worker_id, facts in rows
        for position, device in enumerate((facts or {}).get("gpu_devices", ()))
    ]
    if found:
        op.bulk_insert(devices, found)
    if connection.scalar(sa.select(sa.table("usage", sa.column("id")).c.id).limit(1)):
        connection.execute(_sums(hours))


def _device(worker_id: int, position: int, device: dict[str, Any]) -> dict[str, Any]:
    words = {name: str(device.get(name) or "")[:255] for name in ("name", "vendor", "type", "uuid")}
    return words | {
        "worker_id": worker_id,
        "position": position,
        "index": device["index"],
        "type": words["type"] or words["vendor"].lower(),
        "memory_total_bytes": device["memory_total_bytes"],
    }


def _sums(hours: sa.Table) -> sa.Insert:
    names = (
        "model_id", "model", "user_id", "credential_id", "operation", "status",
        "prompt_tokens", "completion_tokens",
    )  # fmt: skip
    usage = sa.table("usage", *map(sa.column, names), sa.column("started_at", types.real()))
    hour = usage.c.started_at / 3600.0
    if op.get_bind().dialect.name != "sqlite":  # whose cast does that, and may have no floor
        hour = sa.func.floor(hour)
    one = sa.select(
        sa.cast(hour, sa.BigInteger()).label("hour"),
        usage.c.model_id,
        usage.c.model,
        sa.func.coalesce(usage.c.user_id, 0).label("user_id"),
        sa.func.coalesce(usage.c.credential_id, 0).label("credential_id"),
        sa.func.substr(usage.c.operation, 1, 64).label("operation"),
        sa.case((usage.c.status >= 400, 1), else_=0).label("failed"),
        usage.c.prompt_tokens,
        usage.c.completion_tokens,
    ).subquery()
    alike = (one.c.hour, one.c.model_id, one.c.user_id, one.c.credential_id, one.c.operation)
    summed = sa.select(
        *alike,
        sa.func.max(one.c.model),
        sa.func.count(),
        sa.func.sum(one.c.failed),
        sa.func.sum(one.c.prompt_tokens),
        sa.func.sum(one.c.completion_tokens),
    ).group_by(*alike)
    columns = [column.name for column in alike]
    sums = ["model", "requests", "failed", "prompt_tokens", "completion_tokens"]
    return hours.insert().from_select([*columns, *sums], summed)


def downgrade() -> None:
    # Made anew, the table would forget which ids it has given.
    with op.batch_alter_table("workers", schema=None, recreate="never") as batch_op:
        batch_op.drop_column("vram_used_bytes")
        batch_op.drop_column("gpu_percent")
        batch_op.drop_column("devices_used")
    with op.batch_alter_table("usage", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_usage_started_at"))
    op.drop_table("usage_hours")
    op.drop_table("load_samples")
    op.drop_table("devices")
