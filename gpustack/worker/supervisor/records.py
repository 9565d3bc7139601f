"""Records of engines on disk: what a new agent needs to find the engines of the one before."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from gpustack.lib import platform
from gpustack.lib.secrets import Secret
from gpustack.schemas.engines import EngineRecord

logger = logging.getLogger(__name__)

#: In an engine's environment, and so in that of each process it starts.
UID_VARIABLE = "GPUSTACK_ENGINE_UID"
HOME_VARIABLE = "GPUSTACK_ENGINE_HOME"


class Record(EngineRecord):
    """A record with what only the agent itself reads.

    Attributes:
        ready: it has answered; from then on silence is a failure, not a slow start.
    """

    ready: bool = False

    @property
    def is_alive(self) -> bool:
        """Whether the recorded process, and not another that got its pid, is alive now."""
        return (
            self.pid is not None
            and self.start_ticks is not None
            and self.boot_id == platform.boot_id()
            and platform.start_ticks(self.pid) == self.start_ticks
            and platform.process_environment(self.pid).get(UID_VARIABLE) == self.uid
        )

    def secret(self) -> Secret:
        """What requests to the engine must show; empty when its file is gone."""
        try:
            return Secret(Path(self.secret_file).read_text(encoding="utf-8").strip())
        except OSError:
            return Secret("")


class Records:
    """The folder `<data-dir>/engines`: one record and one secret file per engine."""

    def __init__(self, data_dir: Path) -> None:
        self.home = data_dir
        self._folder = data_dir / "engines"

    def secret_path(self, uid: str) -> Path:
        return self._folder / f"{uid}.key"

    def put_secret(self, uid: str, secret: Secret) -> None:
        platform.write_private(self.secret_path(uid), secret.reveal() + "\n")

    def put(self, record: Record) -> None:
        platform.write_private(self._path(record.uid), record.model_dump_json())

    def remove(self, uid: str) -> None:
        """Forget an engine of which no process is left."""
        self._path(uid).unlink(missing_ok=True)
        self.secret_path(uid).unlink(missing_ok=True)

    def all(self) -> Iterator[Record]:
        """Every record that can be read; one that cannot is named in the log and left alone."""
        for path in sorted(self._folder.glob("*.json")):
            try:
                yield Record.model_validate_json(path.read_bytes())
            except (OSError, ValidationError) as error:
                logger.warning("cannot read engine record %s: %s", path, error)

    def environment(self, uid: str) -> dict[str, str]:
        """What marks the processes of an engine as ours."""
        return {UID_VARIABLE: uid, HOME_VARIABLE: os.fspath(self.home)}

    def _path(self, uid: str) -> Path:
        return self._folder / f"{uid}.json"


def pid_of(record: Record) -> int:
    """The pid of an engine that was spawned or found."""
    if record.pid is None:
        raise ValueError(f"engine {record.uid} has no process")
    return record.pid
