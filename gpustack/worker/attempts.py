"""What is remembered of instances whose engines failed, also by the next agent."""

import logging
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from gpustack.lib import platform
from gpustack.worker.reconcile import Attempts

logger = logging.getLogger(__name__)


class _File(BaseModel):
    boot_id: str
    attempts: dict[int, Attempts] = Field(default_factory=dict)


class Memory:
    """`<data-dir>/attempts.json`, mode 0600: messages quote the engines' logs.

    Without it a new agent would start at once what must not restart, or is to wait.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unsaved = False
        self.attempts: dict[int, Attempts] = {}

    def load(self) -> None:
        platform.remove_unfinished(self._path.parent, self._path.name)
        try:
            file = _File.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValidationError) as error:
            logger.warning("cannot read %s, starting without it: %s", self._path, error)
            return
        is_clock_the_same = file.boot_id == platform.boot_id()
        self.attempts = {
            id: attempts if is_clock_the_same else replace(attempts, retry_at=0.0)
            for id, attempts in file.attempts.items()
        }

    def put(self, id: int, attempts: Attempts) -> None:
        self.attempts[id] = attempts
        self._unsaved = True

    def started(self, id: int, restart_count: int) -> None:
        """Should this agent end first, the start after this one counts on from it."""
        if (before := self.attempts.get(id)) is not None:
            self.put(id, replace(before, next_count=restart_count + 1))

    def forget(self, id: int) -> None:
        if self.attempts.pop(id, None) is not None:
            self._unsaved = True

    def save(self) -> None:
        """Write what changed to disk; nothing happens if nothing did."""
        if not self._unsaved:
            return
        file = _File(boot_id=platform.boot_id(), attempts=self.attempts)
        try:
            platform.write_private(self._path, file.model_dump_json())
        except OSError as error:
            logger.warning("cannot write %s: %s", self._path, error)
        else:
            self._unsaved = False
