"""What instances of a model are started from."""

from sqlmodel import col, select

from gpustack.server.db.database import ReadSession
from gpustack.server.db.tables import ModelVersion


async def newest_version(session: ReadSession, model_id: int) -> ModelVersion:
    """The version that new instances get."""
    query = select(ModelVersion).where(ModelVersion.model_id == model_id)
    return (await session.exec(query.order_by(col(ModelVersion.generation).desc()).limit(1))).one()
