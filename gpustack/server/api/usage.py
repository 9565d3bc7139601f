"""/v2/usage: token counts from gateways, each exactly once."""

from fastapi import APIRouter, Response

from gpustack.schemas.usage import UsageBatch
from gpustack.server.api.context import Db
from gpustack.server.auth.principals import Gateway
from gpustack.server.db.tables import Usage, UsageSpool

router = APIRouter(prefix="/v2/usage", tags=["usage"])


@router.post("", status_code=204)
async def add(db: Db, gateway: Gateway, batch: UsageBatch) -> Response:
    """Store a batch, unless its sequence was stored before: a repeated one changes nothing."""
    async with db.write() as session:
        spool = await session.get(UsageSpool, batch.spool)
        if spool is None:
            spool = UsageSpool(spool=batch.spool, sequence=0)
        if batch.sequence > spool.sequence:
            spool.sequence = batch.sequence
            session.add(spool)
            session.add_all(Usage(**record.model_dump()) for record in batch.records)
    return Response(status_code=204)
