"""Whether an engine answers at its health path."""

from gpustack.lib.secrets import Secret
from gpustack.worker.supervisor.asking import ask


async def answers(port: int, path: str, secret: Secret, *, limit_s: float = 2.0) -> bool:
    """Whether GET `path` with the engine's secret answers 200 within `limit_s` seconds."""
    try:
        return (await ask(port, path, secret, limit_s=limit_s)).status == 200
    except OSError:  # refused, reset, timed out
        return False
