"""What the server is told of model files: the newest of each, until it answers."""

import asyncio
import logging

from gpustack.client.agents import AgentClient
from gpustack.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    GPUStackError,
    Invalid,
    NotFound,
    Unauthorized,
)
from gpustack.lib.backoff import delay_s
from gpustack.schemas.model_files import (
    ModelFile,
    ModelFileReport,
    ModelFileState,
    ModelFileStatus,
)
from gpustack.schemas.models import ModelSource
from gpustack.worker.model_files import failed

logger = logging.getLogger(__name__)

#: Seconds between two reports of a download's progress.
PROGRESS_S = 5.0

Identity = tuple[str, ...]


class FileReports:
    """The status of each model file as it is, and as the server was told last.

    Args:
        progress_s: progress alone is told this often.

    Attributes:
        rows: of this worker, as the server has them.
    """

    def __init__(self, *, progress_s: float = PROGRESS_S) -> None:
        self._progress_s = progress_s
        self.rows: dict[Identity, ModelFile] = {}
        self._now: dict[Identity, tuple[ModelSource, ModelFileStatus]] = {}
        self._told: dict[Identity, ModelFileStatus] = {}
        self._new: set[Identity] = set()  # the server was asked for a row; it may have answered
        self._news = asyncio.Event()

    def knows(self, source: ModelSource) -> bool:
        """Whether it was said in this life how this file is."""
        return source.identity in self._now

    def put(self, source: ModelSource, status: ModelFileStatus | None) -> None:
        """This is how it is now; None: its download was given up."""
        key = source.identity
        if status is None:
            if key not in self.rows and key not in self._new:
                self.forget(key)
                return
            status = failed("its download was stopped: nothing waits for it; what came is kept")
        before = self._now.get(key)
        self._now[key] = (source, status)
        if before is None or before[1].state is not status.state:
            self._news.set()

    def forget(self, key: Identity) -> None:
        """The server has no such row, and is not to get one."""
        for table in (self.rows, self._now, self._told):
            table.pop(key, None)
        self._new.discard(key)

    def tell_all(self) -> None:
        """The server may have forgotten what it was told."""
        self._told.clear()
        self._news.set()

    async def send(
        self, client: AgentClient, worker_id: int, *, first_s: float = 0.2, limit_s: float = 10.0
    ) -> None:
        """Tell the server each change, for ever.

        Raises:
            Unauthorized: the server does not know this worker's credential.
        """
        failures = 0
        while True:
            self._news.clear()
            try:
                for key in list(self._now):
                    await self._send(client, worker_id, key)
            except (Unauthorized, Forbidden):
                raise
            except GPUStackError as error:
                failures += 1
                if failures == 1:
                    logger.warning("cannot report model files, trying again: %s", error)
                await asyncio.sleep(delay_s(failures, first_s=first_s, limit_s=limit_s))
            else:
                failures = 0
                await self._wait()

    async def _wait(self) -> None:
        """Until something is there to tell."""
        moving = any(status.state is ModelFileState.DOWNLOADING for _, status in self._now.values())
        try:
            async with asyncio.timeout(self._progress_s if moving else None):
                await self._news.wait()
        except TimeoutError:
            pass  # downloads have gone on

    async def _send(self, client: AgentClient, worker_id: int, key: Identity) -> None:
        if key not in self._now:
            return
        source, status = self._now[key]
        row = self.rows.get(key)
        if row is not None:
            status = status.model_copy(update={"observed_generation": row.generation})
        if self._told.get(key) == status:
            return
        try:
            if row is not None:
                await client.report_model_file(row.id, status)
            else:
                self._new.add(key)
                report = _report(source, status)
                self.rows.setdefault(key, await client.report_new_model_file(worker_id, report))
        except NotFound:
            self.forget(key)
        except (BadRequest, Conflict, Invalid) as error:
            logger.warning("the server refuses a report on %s: %s", source.location, error)
        self._told[key] = status
        if status.state is ModelFileState.GONE:
            self.forget(key)


def _report(source: ModelSource, status: ModelFileStatus) -> ModelFileReport:
    """Built without checks: the server has the last word on what is too long."""
    where = {name: getattr(source, name) for name in ModelSource.model_fields}
    return ModelFileReport.model_construct(**where, **status.model_dump())
