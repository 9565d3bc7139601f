"""What the server wants of this worker, as last heard: in memory and on disk."""

import logging
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from gpustack.lib import platform
from gpustack.schemas import wire
from gpustack.schemas.instances import AssignedInstance
from gpustack.schemas.watch import EventType, WatchEvent

logger = logging.getLogger(__name__)

_FILE = TypeAdapter(dict[int, AssignedInstance])

#: What the server shows of our own reports: no news, and not worth a write.
_ECHO = {
    "state", "state_message", "reasons", "port", "pid", "restart_count", "download_progress",
    "observed_generation", "updated_at", "worker_name", "replaced_by",
}  # fmt: skip


class Desired:
    """The instances assigned to this worker.

    With the server away the agent acts on what it heard last, also after a restart of its own:
    `<data-dir>/desired.json`, mode 0600, for it holds the engines' secrets.

    Attributes:
        synced: whether a whole list has been heard in this life; before, absence means nothing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.instances: dict[int, AssignedInstance] = {}
        self.synced = False
        self._listed: set[int] | None = None
        self._unsaved = False

    def load(self) -> None:
        platform.remove_unfinished(self._path.parent, self._path.name)
        try:
            self.instances = _FILE.validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValidationError) as error:
            logger.warning("cannot read %s, starting without it: %s", self._path, error)

    def hear(self, event: WatchEvent) -> AssignedInstance | None:
        """Take in one event of `Caller.follow`; the instance, if that is what it was."""
        if event.type is EventType.RESYNC:
            self._listed = set()
        elif event.type is EventType.SYNCED:
            self._end_of_list()
        elif event.kind != wire.INSTANCES or event.id is None:
            return None
        elif event.type is EventType.PUT:
            return self._put(event.id, event.data)
        elif event.type is EventType.DELETE:
            self.drop(event.id)
        return None

    def drop(self, id: int) -> None:
        """The server has said that this instance is gone."""
        if self.instances.pop(id, None) is not None:
            self._unsaved = True

    def save(self) -> None:
        """Write what changed to disk; nothing happens if nothing did."""
        if self._unsaved:
            try:
                platform.write_private(self._path, _FILE.dump_json(self.instances))
            except OSError as error:
                logger.warning("cannot write %s: %s", self._path, error)
            else:
                self._unsaved = False

    def _put(self, id: int, content: object) -> AssignedInstance | None:
        if self._listed is not None:
            self._listed.add(id)
        try:
            instance = AssignedInstance.model_validate(content)
        except ValidationError as error:
            wrong = error.errors(include_input=False, include_url=False)  # the input has a secret
            logger.warning("cannot understand instance %d, leaving it as it is: %s", id, wrong)
            return None
        before = self.instances.get(instance.id)
        if before is None or before.model_dump(exclude=_ECHO) != instance.model_dump(exclude=_ECHO):
            self._unsaved = True
        self.instances[instance.id] = instance
        return instance

    def _end_of_list(self) -> None:
        if self._listed is None:
            return  # the end of a resumed history: it lists nothing
        for id in set(self.instances) - self._listed:
            self.drop(id)
        self._listed = None
        self.synced = True
