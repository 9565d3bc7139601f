"""A model has as many instances as its spec says, and goes with its last one."""

import asyncio
import random
import string
from collections.abc import Sequence
from pathlib import Path

from sqlmodel import select

from gpustack.errors import GPUStackError
from gpustack.hub.profiles import profile
from gpustack.lib.secrets import Secret
from gpustack.schemas.instances import InstanceState
from gpustack.schemas.models import Source, VersionSpec
from gpustack.schemas.profiles import Profile
from gpustack.server.db.database import Database, WriteSession
from gpustack.server.db.tables import Instance, Model
from gpustack.server.db.versions import newest_version

PROFILE_RETRY_S = 60.0


class Models:
    """Args:
    token: for Hugging Face.
    """

    def __init__(self, db: Database, token: Secret | None) -> None:
        self._db = db
        self._token = token

    async def reconcile(self, key: int) -> float | None:
        again_s = await self._read_profile(key)
        async with self._db.write() as session:
            model = await session.get(Model, key)
            if model is None:
                return None
            instances = (await session.exec(select(Instance).where(Instance.model_id == key))).all()
            if model.deleting and not instances:
                await session.delete(model)
                return None
            wanted = 0 if model.deleting else model.replicas
            live = [instance for instance in instances if not instance.deleting]
            for instance in surplus(live, wanted):
                instance.deleting = True
                instance.generation += 1
            for _ in range(wanted - len(live)):
                await _add_instance(session, model)
        return again_s

    async def _read_profile(self, model_id: int) -> float | None:
        """Read the model's files if its newest version has not been read.

        No transaction is open meanwhile. Answers when to try again.
        """
        async with self._db.read() as session:
            model = await session.get(Model, model_id)
            if model is None or model.deleting:
                return None
            version = await newest_version(session, model_id)
            if model.profile_generation == version.generation:
                return None
        found, message = await _profile(VersionSpec.model_validate(version.spec), self._token)
        async with self._db.write() as session:
            model = await session.get(Model, model_id)
            if model is None:
                return None
            model.state_message = message
            if found is None:
                return PROFILE_RETRY_S
            model.profile = found.model_dump(mode="json")
            model.profile_generation = version.generation
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


async def _exists(path: str) -> bool:
    return await asyncio.to_thread(Path(path).exists)


async def _profile(spec: VersionSpec, token: Secret | None) -> tuple[Profile | None, str]:
    """What the files say, or why nobody could read them, for people to read."""
    if spec.source is Source.LOCAL_PATH and not await _exists(spec.local_path or ""):
        # It may still be on the workers; they say so if it is not.
        message = f"{spec.local_path} is not on the server: its memory need is not known"
        return Profile(weights_bytes=0, source="nothing, the file is not on the server"), message
    try:
        found = await profile(spec, token=token)
    except GPUStackError as error:
        return None, str(error)
    return found, found.problem
