"""What the server wants of this worker's model files: fetched, looked for, removed."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gpustack.errors import GPUStackError
from gpustack.hub.splits import share_files
from gpustack.schemas import wire
from gpustack.schemas.model_files import ModelFile, ModelFileState, ModelFileStatus
from gpustack.schemas.models import ModelSource
from gpustack.schemas.watch import EventType, WatchEvent
from gpustack.worker.file_reports import FileReports
from gpustack.worker.model_files import ModelFiles, downloading, failed, status_of

logger = logging.getLogger(__name__)

#: Seconds between two looks at whether a file that is to go is still used.
AGAIN_S = 1.0


class FileOrders:
    """Makes of each row what is to be: one task of `group` each, and reports.

    Args:
        used: what this worker's instances are started from.
    """

    def __init__(
        self,
        group: asyncio.TaskGroup,
        files: ModelFiles,
        reports: FileReports,
        used: Callable[[], Iterable[ModelSource]],
    ) -> None:
        self._group = group
        self._files = files
        self._used = used
        self.reports = reports
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._begun: dict[int, int] = {}  # row -> generation that was acted on
        self._listed: set[int] | None = None

    def hear(self, event: WatchEvent) -> None:
        """Take in one event of `Caller.follow`."""
        if event.type is EventType.RESYNC:
            self._listed = set()
        elif event.type is EventType.SYNCED:
            self._end_of_list()
        elif event.kind != wire.MODEL_FILES or event.id is None:
            return
        elif event.type is EventType.PUT:
            self._put(event.id, event.data)
        elif event.type is EventType.DELETE:
            self._drop(event.id)

    def let_go(self) -> None:
        """Begin nothing and end what is under way; the next agent goes on with it."""
        for task in self._tasks.values():
            task.cancel()

    def _end_of_list(self) -> None:
        if self._listed is None:
            return  # the end of a resumed history: it lists nothing
        for row in list(self.reports.rows.values()):
            if row.id not in self._listed:
                self._drop(row.id)
        self._listed = None
        self.reports.tell_all()

    def _drop(self, id: int) -> None:
        """The row is gone: a download that only it asked for ends."""
        for key, row in list(self.reports.rows.items()):
            if row.id == id:
                self.reports.forget(key)
        self._begun.pop(id, None)
        if (task := self._tasks.pop(id, None)) is not None:
            task.cancel()

    def _put(self, id: int, content: object) -> None:
        if self._listed is not None:
            self._listed.add(id)
        try:
            row = ModelFile.model_validate(content)
        except ValidationError as error:
            logger.warning("cannot understand model file %d, leaving it: %s", id, error)
            return
        self.reports.rows[row.identity] = row
        is_asked = row.observed_generation < row.generation > self._begun.get(id, 0)
        is_new = not self.reports.knows(row)  # what an earlier agent left
        if row.deleting:
            if is_asked or is_new:
                self._own(row, self._remove(row))
        elif is_asked or (is_new and row.state is ModelFileState.DOWNLOADING):
            self.reports.put(row, downloading(0.0))
            self._own(row, self._fetch(row))
        elif is_new and row.state is ModelFileState.READY:
            self._own(row, self._look(row))

    def _own(self, row: ModelFile, work: Coroutine[Any, Any, None]) -> None:
        if (before := self._tasks.get(row.id)) is not None:
            before.cancel()
        self._begun[row.id] = row.generation
        task = self._tasks[row.id] = self._group.create_task(self._guarded(row, work))

        def over(_: asyncio.Task[None]) -> None:
            if self._tasks.get(row.id) is task:
                del self._tasks[row.id]

        task.add_done_callback(over)

    async def _guarded(self, row: ModelFile, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # one file's trouble must not end the agent
            logger.exception("model file %d: %s failed", row.id, row.location)
            self.reports.put(row, failed(f"{row.location}: the agent failed: {error!r}"))

    async def _fetch(self, row: ModelFile) -> None:
        logger.info("fetching %s, as asked", row.location)
        found = await self._files.path(row, lambda _: None)
        self.reports.put(row, await asyncio.to_thread(status_of, found))

    async def _look(self, row: ModelFile) -> None:
        """Whether what is said to be here still is."""
        self.reports.put(row, await asyncio.to_thread(_looked_at, row))

    async def _remove(self, row: ModelFile) -> None:
        while any(share_files(row, source) for source in self._used()):  # noqa: ASYNC110
            await asyncio.sleep(AGAIN_S)
        try:
            await self._files.remove(row)
        except (GPUStackError, OSError) as error:
            self.reports.put(row, failed(f"cannot remove {row.location}: {error}"))
        else:
            logger.info("removed %s, as asked", row.location)
            self.reports.put(row, ModelFileStatus(state=ModelFileState.GONE))


def _looked_at(row: ModelFile) -> ModelFileStatus:
    if not row.resolved_paths:
        return failed("nobody knows where it is: fetch it again")
    return status_of(Path(row.resolved_paths[0]))
