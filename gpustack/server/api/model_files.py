"""/v2/model-files: what models' files workers have, fetch, and should fetch."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from gpustack.errors import BadRequest, Conflict, Forbidden, NotFound, raises
from gpustack.schemas import wire
from gpustack.schemas.base import Page
from gpustack.schemas.model_files import (
    ModelFile,
    ModelFileCreate,
    ModelFileReport,
    ModelFileState,
    ModelFileStatus,
)
from gpustack.schemas.models import Source
from gpustack.server.api.context import Changes, Db, Id
from gpustack.server.api.lists import Asked, IdFilter, WatchQuery, listed
from gpustack.server.api.repeated import Repeated
from gpustack.server.api.streams import WATCHED
from gpustack.server.auth.principals import Admin, Watcher, WorkerAgent
from gpustack.server.db import model_files, tables
from gpustack.server.db.database import get
from gpustack.server.db.states import model_file_state
from gpustack.server.views import model_file_view

router = APIRouter(prefix="/v2", tags=["model-files"], route_class=Repeated)

Cleanup = Annotated[bool, Query(description="Remove the file from the worker's disk too.")]


class ModelFileQuery(WatchQuery):
    TABLE, KIND = tables.ModelFile, wire.MODEL_FILES
    COLUMNS = {"state": model_file_state()}
    SEARCHED = ("huggingface_repo_id", "huggingface_filename", "local_path")
    SORTED = ("source", "worker_id", "state", "size", "created_at", "updated_at")

    worker_id: IdFilter = None
    source: list[Source] = []
    huggingface_repo_id: str | None = None
    huggingface_filename: str | None = None
    local_path: str | None = None
    state: list[ModelFileState] = []
    deleting: bool | None = None


@router.get("/model-files", response_model=Page[ModelFile], responses=WATCHED)
@raises(BadRequest)
async def list_model_files(
    db: Db, feed: Changes, watcher: Watcher, query: Asked[ModelFileQuery]
) -> Any:
    return await listed(db, feed, watcher, query)


@router.get("/model-files/{file_id}")
async def get_model_file(db: Db, admin: Admin, file_id: Id) -> ModelFile:
    async with db.read() as session:
        return model_file_view(await get(session, tables.ModelFile, file_id))


@router.post("/model-files", status_code=201)
@raises(NotFound, Conflict)
async def create_model_file(db: Db, admin: Admin, wanted: ModelFileCreate) -> ModelFile:
    """Have a worker fetch this now, so that no instance waits for it later.

    Of a local path the worker only says whether it is there.
    """
    async with db.write() as session:
        worker = await get(session, tables.Worker, wanted.worker_id)
        if (found := await model_files.of_source(session, wanted.worker_id, wanted)) is not None:
            raise Conflict(
                f"worker {worker.name} has {wanted.location} as model file {found.id} already",
                current=model_file_view(found).model_dump(mode="json"),
            )
        row = await model_files.add(session, wanted.worker_id, wanted)
    return model_file_view(row)


@router.post("/model-files/{file_id}/reset", status_code=202)
@raises(Conflict)
async def reset_model_file(db: Db, admin: Admin, file_id: Id) -> ModelFile:
    """Have the worker fetch it again: what failed is tried anew, what is there is looked for."""
    async with db.write() as session:
        row = await get(session, tables.ModelFile, file_id)
        if row.deleting:
            raise Conflict(f"model file {file_id} is being removed from its worker's disk")
        row.generation += 1
    return model_file_view(row)


@router.delete(
    "/model-files/{file_id}",
    status_code=204,
    responses={202: {"description": "It goes once the worker has removed the file."}},
)
@raises(BadRequest, Conflict)
async def delete_model_file(
    db: Db, admin: Admin, file_id: Id, cleanup: Cleanup = False
) -> Response:
    """Forget a file, which stays on the worker's disk unless `cleanup` is asked for.

    A download that only this asked for ends. With `cleanup` the row goes once the worker has
    removed the file, so with a silent worker it stays; deleted again without, it goes at once.
    """
    async with db.write() as session:
        row = await get(session, tables.ModelFile, file_id)
        if not cleanup:
            await session.delete(row)
            return Response(status_code=204)
        if row.source == Source.LOCAL_PATH:
            raise BadRequest(
                f"cleanup: {row.local_path} was not put there by gpustack: leave out cleanup to "
                "forget it, and remove it yourself"
            )
        if users := await model_files.users_of(session, row):
            raise Conflict(f"model file {file_id} is used by {', '.join(users)}: delete that first")
        row.deleting = True
        row.generation += 1
    return Response(status_code=202)


# --- what workers say ------------------------------------------------------------------------


@router.post("/workers/{worker_id}/model-files")
@raises(BadRequest)
async def report_new(
    db: Db, worker: WorkerAgent, worker_id: Id, report: ModelFileReport
) -> ModelFile:
    """The worker has a file, or fetches it, that nobody asked for here. It gets a row."""
    if worker.worker_id != worker_id:
        raise Forbidden("this is another worker's")
    async with db.write() as session:
        await get(session, tables.Worker, worker_id)
        row = await model_files.of_source(session, worker_id, report)
        if row is None:
            row = await model_files.add(session, worker_id, report)
        if report.state is ModelFileState.GONE:
            raise BadRequest("state: what is gone has no row")
        model_files.take_in(row, report)
    return model_file_view(row)


@router.put("/model-files/{file_id}/status", status_code=204)
@raises(Conflict)
async def report(db: Db, worker: WorkerAgent, file_id: Id, status: ModelFileStatus) -> Response:
    """What the worker that the file is on says. `gone` ends the row."""
    async with db.write() as session:
        row = await get(session, tables.ModelFile, file_id)
        if row.worker_id != worker.worker_id:
            raise Forbidden("this model file is not on this worker")
        if status.state is not ModelFileState.GONE:
            model_files.take_in(row, status)
        elif row.deleting:
            await session.delete(row)
        else:
            raise Conflict(f"model file {file_id} is wanted: it was not to be removed")
    return Response(status_code=204)
