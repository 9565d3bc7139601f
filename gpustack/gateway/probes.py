"""What a process of the data plane says of itself: /healthz, /readyz and /version."""

from typing import Final

import gpustack
from gpustack.forward.exchange import Exchange
from gpustack.gateway.routes import PROBES

PROBE_PATHS: Final = frozenset(route.pattern for route in PROBES)


def probe(exchange: Exchange, not_ready: str | None) -> None:
    """Answer /healthz, /readyz or /version."""
    text = [(b"content-type", b"text/plain; charset=utf-8")]
    if exchange.path == "/version":
        exchange.respond_json(200, {"version": gpustack.__version__})
    elif exchange.path == "/readyz" and not_ready is not None:
        exchange.respond(503, text, not_ready.encode())
    else:
        exchange.respond(200, text, b"ok")
