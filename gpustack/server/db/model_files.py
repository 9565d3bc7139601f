"""Model files as rows: a worker has each source once."""

import json

from sqlmodel import col, select

from gpustack.hub.splits import share_files
from gpustack.lib.secrets import digest
from gpustack.schemas.model_files import ModelFileStatus
from gpustack.schemas.models import ModelSource, Source
from gpustack.server.db.database import ReadSession, WriteSession
from gpustack.server.db.instances import on_worker
from gpustack.server.db.tables import ModelFile, ModelVersion
from gpustack.server.db.versions import spec_of


async def of_source(session: ReadSession, worker_id: int, source: ModelSource) -> ModelFile | None:
    """The row of what a worker has of a source, or is to have."""
    query = select(ModelFile).where(
        ModelFile.worker_id == worker_id, ModelFile.source_digest == _digest(source)
    )
    return (await session.exec(query)).one_or_none()


async def add(session: WriteSession, worker_id: int, source: ModelSource) -> ModelFile:
    """A new row. Whoever adds one holds the worker's, so no two are added of one source."""
    fields = {"source", "huggingface_repo_id", "huggingface_filename"}
    if source.source is Source.LOCAL_PATH:
        fields = {"source", "local_path"}
    row = ModelFile(
        worker_id=worker_id,
        source_digest=_digest(source),
        **source.model_dump(mode="json", include=fields),
    )
    session.add(row)
    await session.flush()
    return row


def take_in(row: ModelFile, status: ModelFileStatus) -> None:
    """Have the row say what its worker says."""
    values = status.model_dump(include=set(ModelFileStatus.model_fields) - {"state"})
    for name, value in (values | {"reported_state": status.state.value}).items():
        if getattr(row, name) != value:
            setattr(row, name, value)


async def users_of(session: ReadSession, row: ModelFile) -> list[str]:
    """Names of the instances on its worker that may have been started from the file."""
    on_it = await on_worker(session, row.worker_id)
    query = select(ModelVersion).where(col(ModelVersion.id).in_({one.version_id for one in on_it}))
    of_file = {
        version.id
        for version in (await session.exec(query)).all()
        if share_files(ModelSource.model_validate(row.model_dump()), spec_of(version))
    }
    return [one.name for one in on_it if one.version_id in of_file]


def _digest(source: ModelSource) -> str:
    return digest(json.dumps(source.identity))
