"""A model file: the files of one source on one worker."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field, Strict

from gpustack.schemas.base import Body, Time
from gpustack.schemas.models import ModelSource

Word = Annotated[str, Field(max_length=255)]
Location = Annotated[str, Field(max_length=1024)]
Percent = Annotated[float, Field(ge=0, le=100)]


class ModelFileState(StrEnum):
    DOWNLOADING = "downloading"  # the worker fetches it, or was asked to and has not said anything
    READY = "ready"  # it is on the worker, whole
    ERROR = "error"  # it is not there; state_message says why
    GONE = "gone"  # the worker has removed it; the row goes with this report


class FileSource(ModelSource):
    """A source that fits into a row."""

    huggingface_repo_id: Word | None = None
    huggingface_filename: Location | None = None
    local_path: Location | None = None


class ModelFileCreate(FileSource, Body):
    """Body of POST /v2/model-files: have this on a worker, before an instance needs it."""

    worker_id: int = Field(ge=1, le=2**63 - 1)


class ModelFileStatus(Body):
    """What the worker that a file is on says of it. It is the only writer.

    Attributes:
        observed_generation: the generation of the model file that this report is about.
        size: bytes of all its parts; None: not known yet.
        download_progress: the share that is there, percent.
        resolved_paths: where it is, the first part first.
    """

    state: Annotated[ModelFileState, Strict(False)]
    state_message: str = Field("", max_length=10_000)
    observed_generation: int = Field(1, ge=0, le=2**31 - 1)
    size: int | None = Field(None, ge=0, le=2**63 - 1)
    download_progress: Percent | None = None
    resolved_paths: list[str] = Field(default_factory=list, max_length=1000)


class ModelFileReport(FileSource, ModelFileStatus):
    """Body of POST /v2/workers/{id}/model-files: a file that the worker fetched unasked."""


class ModelFile(ModelSource):
    """A model file as the API shows it.

    Attributes:
        generation: counts how often it was asked for.
        deleting: the row goes once the worker has removed the file from its disk.
    """

    id: int
    worker_id: int
    generation: int
    state: ModelFileState
    state_message: str = ""
    observed_generation: int = 0
    size: int | None = None
    download_progress: float | None = None
    resolved_paths: list[str] = Field(default_factory=list)
    deleting: bool = False
    created_at: Time
    updated_at: Time


def shown_state(
    *, generation: int, observed_generation: int, reported: ModelFileState | None
) -> ModelFileState:
    """The state a user sees: what was asked for and not answered yet is under way."""
    if reported is None or observed_generation < generation:
        return ModelFileState.DOWNLOADING
    return reported
