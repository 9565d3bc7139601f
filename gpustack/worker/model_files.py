"""Model files on this worker: one owner task per file, however many engines wait for it."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from gpustack.errors import GPUStackError
from gpustack.lib.secrets import Secret
from gpustack.schemas.models import Source, VersionSpec
from gpustack.worker.reconcile import Failure, Trouble

logger = logging.getLogger(__name__)

Progress = Callable[[float], None]


class Fetcher(Protocol):
    """`gpustack.hub.files.fetch`."""

    async def __call__(
        self, spec: VersionSpec, cache_dir: Path, *, token: Secret | None, progress: Progress
    ) -> Path: ...


@dataclass
class _Fetch:
    task: asyncio.Task[Path | Failure]
    listeners: list[Progress] = field(default_factory=list)


class ModelFiles:
    """Where the files of models are, fetching those that are not here yet.

    Args:
        group: where downloads run.
        fetcher: None: the hub's.
    """

    def __init__(
        self,
        group: asyncio.TaskGroup,
        *,
        cache_dir: Path,
        token: Secret | None,
        worker_name: str,
        fetcher: Fetcher | None = None,
    ) -> None:
        self._group = group
        self._cache_dir = cache_dir
        self._token = token
        self._worker_name = worker_name
        self._fetcher = fetcher
        self._fetches: dict[tuple[str | None, str | None], _Fetch] = {}

    async def path(self, spec: VersionSpec, progress: Progress) -> Path | Failure:
        """The file or folder to run, on this worker.

        A download ends when nobody waits for it any more; what it has got is kept.

        Args:
            progress: told the share that is here, percent.
        """
        if spec.source is Source.LOCAL_PATH:
            return await asyncio.to_thread(self._local, spec.local_path or "")
        key = (spec.huggingface_repo_id, spec.huggingface_filename)
        fetch = self._fetches.get(key)
        if fetch is None:
            fetch = self._fetches[key] = self._begin(key, spec)
        fetch.listeners.append(progress)
        try:
            return await asyncio.shield(fetch.task)
        finally:
            fetch.listeners.remove(progress)
            if not fetch.listeners and self._fetches.get(key) is fetch:
                del self._fetches[key]
                fetch.task.cancel()

    def _local(self, path: str) -> Path | Failure:
        try:
            if Path(path).exists():
                return Path(path)
        except OSError as error:
            why = error.strerror or str(error)
            sentence = f"cannot look for {path} on worker {self._worker_name}: {why}"
            return Failure(Trouble.FILES, sentence)
        return Failure(Trouble.FILES, f"file not found: {path} on worker {self._worker_name}")

    def _begin(self, key: tuple[str | None, str | None], spec: VersionSpec) -> _Fetch:
        def progress(percent: float) -> None:
            for listener in list(self._fetches[key].listeners) if key in self._fetches else ():
                listener(percent)

        return _Fetch(self._group.create_task(self._fetch(spec, progress)))

    async def _fetch(self, spec: VersionSpec, progress: Progress) -> Path | Failure:
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
