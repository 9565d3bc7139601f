"""Records of engines on disk: what a new agent needs to find the engines of the one before."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from gpustack.backends.base import Limits, ProbeRequest
from gpustack.lib import platform
from gpustack.lib.secrets import Secret
from gpustack.schemas.engines import EngineRecord

logger = logging.getLogger(__name__)

#: In an engine's environment, and so in that of each process it starts.
UID_VARIABLE = "GPUSTACK_ENGINE_UID"
HOME_VARIABLE = "GPUSTACK_ENGINE_HOME"
#: In its place where the process is a vendor's tool, and no engine's.
TOOL_HOME_VARIABLE = "GPUSTACK_TOOL_HOME"


class Record(EngineRecord):
    """A record with what only the agent itself reads.

    Attributes:
        progress_counters: its metrics of which one grows while it works.
        probe: the real request that it must answer; None: nobody knows one.
        limits: of its backend, as it was started.
        ready: it has answered; from then on silence is a failure, not a slow start.
    """

    progress_counters: list[str] = []
    probe: ProbeRequest | None = None
    limits: Limits = Limits()
    ready: bool = False

    @property
    def is_alive(self) -> bool:
        """Whether the recorded process, and not another that got its pid, is alive now.

        Pid, start time and boot name one process for ever. Its environment is not asked: programs
        overwrite theirs.
        """
        return (
            self.pid is not None
            and self.start_ticks is not None
            and self.boot_id == platform.boot_id()
            and platform.start_ticks(self.pid) == self.start_ticks
        )

    def secret(self) -> Secret:
        """What requests to the engine must show; empty when its file is gone."""
        try:
            return Secret(Path(self.secret_file).read_text(encoding="utf-8").strip())
        except OSError:
            return Secret("")


class Unwritten(OSError):
    """A file that must be there before an engine is started cannot be written."""

    def __init__(self, path: Path | str, error: OSError) -> None:
        super().__init__(f"cannot write {path}: {error.strerror or error}")


class Records:
    """The folder `<data-dir>/engines`: one record and one secret file per engine."""

    def __init__(self, data_dir: Path) -> None:
        self.home = data_dir
        self._folder = data_dir / "engines"

    def secret_path(self, uid: str) -> Path:
        return self._folder / f"{uid}.key"

    def put_secret(self, uid: str, secret: Secret) -> None:
        _write(self.secret_path(uid), secret.reveal() + "\n")

    def put(self, record: Record) -> None:
        _write(self._path(record.uid), record.model_dump_json())

    def remove(self, uid: str) -> None:
        """Forget an engine of which no process is left.

        A record that cannot be removed does no harm: the next agent finds its engine gone.
        """
        for path in (self._path(uid), self.secret_path(uid)):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("cannot remove %s: %s", path, error.strerror)

    def all(self) -> Iterator[Record]:
        """Every record that can be read; one that cannot is named in the log and left alone."""
        for path in sorted(self._folder.glob("*.json")):
            try:
                yield Record.model_validate_json(path.read_bytes())
            except (OSError, ValidationError) as error:
                logger.warning("cannot read engine record %s: %s", path, error)

    def tidy(self) -> None:
        """Remove what an agent that was killed had only begun. For who alone writes here."""
        platform.remove_unfinished(self._folder)
        for path in self._folder.glob("*.key"):
            if not self._path(path.stem).exists():
                self.remove(path.stem)

    def environment(self, uid: str) -> dict[str, str]:
        """What marks the processes of an engine as ours."""
        return {UID_VARIABLE: uid, HOME_VARIABLE: os.fspath(self.home)}

    def environment_of_tools(self) -> dict[str, str]:
        """What marks vendors' tools as ours."""
        return {TOOL_HOME_VARIABLE: os.fspath(self.home)}

    def _path(self, uid: str) -> Path:
        return self._folder / f"{uid}.json"


def _write(path: Path, text: str) -> None:
    try:
        platform.write_private(path, text)
    except OSError as error:
        raise Unwritten(path, error) from error


def pid_of(record: Record) -> int:
    """The pid of an engine that was spawned or found."""
    if record.pid is None:
        raise ValueError(f"engine {record.uid} has no process")
    return record.pid
