"""Engines: how each can run a model, and how it is started. Pure; one file per engine."""

from gpustack.backends.base import Backend
from gpustack.backends.llama_box import LlamaBox
from gpustack.schemas.models import VersionSpec

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (LlamaBox(),)}


def backend_for(spec: VersionSpec) -> Backend | None:
    """The backend that `spec` names, or else the first that runs its files; None: no such."""
    if spec.backend is not None:
        return BACKENDS.get(spec.backend)
    return next((backend for backend in BACKENDS.values() if backend.runs(spec)), None)
