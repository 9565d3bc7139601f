"""Typed client of this project's own API."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpustack.client.client import Client

__all__ = ["Client"]


def __getattr__(name: str) -> Any:
    """Load `Client` where it is used: agents, which start often, need only `client.agents`."""
    if name != "Client":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gpustack.client.client import Client

    return Client
