"""Public facts: alive, ready, which version."""

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from gpustack import __version__

router = APIRouter(tags=["probes"])


@router.get("/healthz", response_class=PlainTextResponse)
async def healthz() -> str:
    return "ok"


@router.get("/readyz", response_class=PlainTextResponse)
async def readyz() -> str:
    """The server answers only once its database is migrated and its controllers run."""
    return "ok"


@router.get("/version")
async def get_version() -> dict[str, str]:
    return {"version": __version__}
