"""An instance that was never placed is gone as soon as it should be: nobody has anything of it.

A placed one goes when its worker says that every process of it has ended, or with its worker.
"""

from gpustack.server.db.database import Database
from gpustack.server.db.instances import remove
from gpustack.server.db.tables import Instance


class Instances:
    def __init__(self, db: Database) -> None:
        self._db = db

    async def reconcile(self, key: int) -> float | None:
        async with self._db.write() as session:
            instance = await session.get(Instance, key)
            if instance is not None and instance.deleting and instance.worker_id is None:
                await remove(session, instance)
        return None
