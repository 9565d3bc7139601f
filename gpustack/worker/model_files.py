"""Model files on this worker: one owner task per file, however many engines wait for it."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from gpustack.errors import GPUStackError
from gpustack.hub.splits import parts
from gpustack.lib.secrets import Secret
from gpustack.lib.text import plain
from gpustack.schemas.model_files import ModelFileState, ModelFileStatus
from gpustack.schemas.models import ModelSource, Source
from gpustack.worker.reconcile import Failure, Trouble

logger = logging.getLogger(__name__)

#: Characters of a failure that are told.
MESSAGE_LIMIT = 10_000

Progress = Callable[[float], None]
#: Told how a file of a Hub is; None: its download was given up.
Tell = Callable[[ModelSource, ModelFileStatus | None], None]


class Fetcher(Protocol):
    """`gpustack.hub.files.fetch`."""

    async def __call__(
        self, spec: ModelSource, cache_dir: Path, *, token: Secret | None, progress: Progress
    ) -> Path: ...


@dataclass
class _Fetch:
    task: asyncio.Task[Path | Failure]
    listeners: list[Progress] = field(default_factory=list)


class ModelFiles:
    """Where the files of models are, fetching those that are not here yet.

    Args:
        group: where downloads run.
        tell: hears of each change of what comes from a Hub.
        fetcher: None: the hub's.
    """

    def __init__(
        self,
        group: asyncio.TaskGroup,
        *,
        cache_dir: Path,
        token: Secret | None,
        worker_name: str,
        tell: Tell = lambda _, __: None,
        fetcher: Fetcher | None = None,
    ) -> None:
        self._group = group
        self._cache_dir = cache_dir
        self._token = token
        self._worker_name = worker_name
        self._tell = tell
        self._fetcher = fetcher
        self._fetches: dict[tuple[str, ...], _Fetch] = {}

    async def path(self, spec: ModelSource, progress: Progress) -> Path | Failure:
        """The file or folder to run, on this worker.

        A download ends when nobody waits for it any more; what it has got is kept.

        Args:
            progress: told the share that is here, percent.
        """
        if spec.source is Source.LOCAL_PATH:
            return await asyncio.to_thread(self._local, spec.local_path or "")
        key = spec.identity
        fetch = self._fetches.get(key)
        if fetch is None:
            fetch = self._fetches[key] = self._begin(spec)
        fetch.listeners.append(progress)
        try:
            return await asyncio.shield(fetch.task)
        finally:
            fetch.listeners.remove(progress)
            if not fetch.listeners and self._fetches.get(key) is fetch:
                del self._fetches[key]
                if fetch.task.cancel():
                    self._tell(spec, None)

    async def remove(self, spec: ModelSource) -> None:
        """Have nothing of it in the cache any more.

        Raises:
            GPUStackError, OSError: why that cannot be.
        """
        from gpustack.hub.files import remove  # as below

        await asyncio.to_thread(remove, spec, self._cache_dir)

    def _local(self, path: str) -> Path | Failure:
        try:
            if Path(path).exists():
                return Path(path)
        except OSError as error:
            why = error.strerror or str(error)
            sentence = f"cannot look for {path} on worker {self._worker_name}: {why}"
            return Failure(Trouble.FILES, sentence)
        return Failure(Trouble.FILES, f"file not found: {path} on worker {self._worker_name}")

    def _begin(self, spec: ModelSource) -> _Fetch:
        key = spec.identity

        def progress(percent: float) -> None:
            self._tell(spec, downloading(percent))
            for listener in list(self._fetches[key].listeners) if key in self._fetches else ():
                listener(percent)

        return _Fetch(self._group.create_task(self._told(spec, progress)))

    async def _told(self, spec: ModelSource, progress: Progress) -> Path | Failure:
        found = await self._fetch(spec, progress)
        self._tell(spec, await asyncio.to_thread(status_of, found))
        return found

    async def _fetch(self, spec: ModelSource, progress: Progress) -> Path | Failure:
        fetcher = self._fetcher
        if fetcher is None:
            from gpustack.hub.files import fetch  # its libraries are heavy, and often not needed

            fetcher = fetch
        try:
            path = await fetcher(spec, self._cache_dir, token=self._token, progress=progress)
        except (GPUStackError, OSError) as error:
            return Failure(Trouble.FILES, f"cannot fetch {spec.location}: {error}")
        except Exception as error:  # one file's trouble must not end the agent
            logger.exception("fetching %s failed", spec.location)
            return Failure(
                Trouble.FILES, f"cannot fetch {spec.location}: the agent failed: {error!r}"
            )
        return path


def downloading(percent: float) -> ModelFileStatus:
    return ModelFileStatus(state=ModelFileState.DOWNLOADING, download_progress=percent)


def failed(sentence: str) -> ModelFileStatus:
    text = plain(sentence)[:MESSAGE_LIMIT]
    return ModelFileStatus(state=ModelFileState.ERROR, state_message=text)


def status_of(found: Path | Failure) -> ModelFileStatus:
    """What is said of a file that was looked for. Blocks."""
    if isinstance(found, Failure):
        return failed(found.sentence)
    try:
        paths = [found.parent / name for name in parts(found.name)]
        inside = [path for path in found.iterdir() if path.is_file()] if found.is_dir() else paths
        return ModelFileStatus(
            state=ModelFileState.READY,
            size=sum(path.stat().st_size for path in inside),
            download_progress=100.0,
            resolved_paths=[str(path) for path in paths],
        )
    except OSError as error:
        return failed(f"cannot look at {found}: {error.strerror or error}")
    except ValueError:  # a cache directory whose name is no text
        return failed(f"the path {found} cannot be told")
