"""Typed client of this project's own API."""

from gpustack.client.client import Client

__all__ = ["Client"]
