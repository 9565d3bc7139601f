"""What a model's files say is read once per version, however long that takes."""

import asyncio
from pathlib import Path

from sqlmodel import col, select

from gpustack.errors import GPUStackError
from gpustack.hub.profiles import profile
from gpustack.lib.secrets import Secret
from gpustack.schemas.models import Source, VersionSpec
from gpustack.schemas.profiles import Profile
from gpustack.server.db.database import Database, touch
from gpustack.server.db.tables import Model, ModelVersion

RETRY_S = 60.0


class Profiles:
    """Args:
    token: for Hugging Face.
    """

    def __init__(self, db: Database, token: Secret | None) -> None:
        self._db = db
        self._token = token

    async def reconcile(self, key: int) -> float | None:
        """Read the newest unread version of model `key`. No transaction is open meanwhile."""
        unread = (
            select(ModelVersion)
            .where(ModelVersion.model_id == key, col(ModelVersion.profile).is_(None))
            .order_by(col(ModelVersion.generation).desc())
            .limit(1)
        )
        async with self._db.read() as session:
            version = (await session.exec(unread)).first()
        if version is None:
            return None
        found, problem = await _read(VersionSpec.model_validate(version.spec), self._token)
        async with self._db.write() as session:
            row = await session.get(ModelVersion, version.id)
            model = await session.get(Model, key)
            if row is None or model is None or model.deleting:
                return None
            if found is not None:
                row.profile = found.model_dump(mode="json")
            if found is not None or row.problem != problem:
                row.problem = problem
                touch(session, model)  # watchers see the newest version's in it
        return None if found is not None else RETRY_S


async def _read(spec: VersionSpec, token: Secret | None) -> tuple[Profile | None, str]:
    """What the files say, or why nobody could read them, for people to read."""
    if spec.source is Source.LOCAL_PATH and not await _exists(spec.local_path or ""):
        # It may still be on the workers; they say so if it is not.
        problem = f"{spec.local_path} is not on the server: its memory need is not known"
        return Profile(weights_bytes=0, source="nothing, the file is not on the server"), problem
    try:
        found = await profile(spec, token=token)
    except GPUStackError as error:
        return None, str(error)
    return found, found.problem


async def _exists(path: str) -> bool:
    try:
        return await asyncio.to_thread(Path(path).exists)
    except OSError:  # a name that no file can have, or a folder that is not ours to look into
        return False
