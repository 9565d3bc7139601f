"""The end of an instance's row."""

from gpustack.server.db.database import WriteSession, touch
from gpustack.server.db.tables import Instance, Model


async def remove(session: WriteSession, row: Instance) -> None:
    """Delete `row`, and have its model looked at: it may want another, or wait for this end."""
    model = await session.get_one(Model, row.model_id)
    touch(session, model)
    await session.delete(row)
