"""A model has as many instances as its spec says, and goes with its last one."""

import random
import string
from collections.abc import Sequence

from sqlmodel import select

from gpustack.schemas.instances import InstanceState
from gpustack.server.db.database import Database, WriteSession
from gpustack.server.db.instances import begin_end
from gpustack.server.db.tables import Instance, Model
from gpustack.server.db.versions import newest_version


class Models:
    """Waits for nobody: what takes time is the work of `Profiles` and of the workers."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def reconcile(self, key: int) -> float | None:
        async with self._db.write() as session:
            model = await session.get(Model, key)
            if model is None:
                return None
            rows = select(Instance).where(Instance.model_id == key)
            instances = list((await session.exec(rows)).all())
            wanted = 0 if model.deleting else model.replicas
            live = [instance for instance in instances if not instance.deleting]
            for instance in surplus(live, wanted):
                if instance.worker_id is None:  # nobody has anything of it
                    await session.delete(instance)
                    instances.remove(instance)
                else:
                    begin_end(session, instance, model)
            for _ in range(wanted - len(live)):
                await _add_instance(session, model)
            if model.deleting and not instances:
                await session.flush()
                await session.delete(model)
        return None


def surplus(instances: Sequence[Instance], wanted: int) -> list[Instance]:
    """The instances to remove: first those that do not run, then the youngest."""

    def worth(instance: Instance) -> tuple[bool, bool, int]:
        running = instance.reported_state == InstanceState.RUNNING
        return (running, instance.worker_id is not None, -(instance.id or 0))

    return sorted(instances, key=worth)[: max(len(instances) - wanted, 0)]


async def _add_instance(session: WriteSession, model: Model) -> None:
    version = await newest_version(session, model.key()[1])
    letters = "".join(random.choices(string.ascii_lowercase + string.digits, k=5))  # noqa: S311
    session.add(
        Instance(
            name=f"{model.name}-{letters}", model_id=version.model_id, version_id=version.id or 0
        )
    )
