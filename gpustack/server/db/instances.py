"""How an instance's row ends. Its model is told each time: what it shows depends on it."""

from gpustack.server.db.database import WriteSession, touch
from gpustack.server.db.tables import Instance, Model


def begin_end(session: WriteSession, row: Instance, model: Model) -> None:
    """Have the instance's worker stop it. The row goes when the worker says that it is gone."""
    if not row.deleting:
        row.deleting = True
        row.generation += 1
        touch(session, model)


async def remove(session: WriteSession, row: Instance) -> None:
    """Delete the row: nothing of the instance runs any more."""
    touch(session, await session.get_one(Model, row.model_id))
    await session.delete(row)
