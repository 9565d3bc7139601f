"""A port that serves `GET /metrics` in Prometheus' text format, and nothing else."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from gpustack import __version__
from gpustack.errors import GPUStackError, NotFound
from gpustack.forward.address import is_local
from gpustack.forward.listener import Exchange, Server, asynchronous

PATH: Final = "/metrics"


@dataclass(frozen=True)
class Metric:
    """One metric family.

    Attributes:
        values: label values, in the order of `labels`, -> value.
        counts: it only grows while this process lives; its name ends in `_total`.
    """

    name: str
    meaning: str
    labels: tuple[str, ...] = ()
    values: Mapping[tuple[str, ...], float] = field(default_factory=dict)
    counts: bool = False


#: The metrics of now.
Gather = Callable[[], Awaitable[list[Metric]]]
#: Returns if who asks from elsewhere may know them.
#:
#: Raises:
#:     Unauthorized, Forbidden: they may not.
Admit = Callable[[Exchange], Awaitable[None]]


class MethodNotAllowed(GPUStackError):
    """Metrics are read with GET."""

    status, code = 405, "method_not_allowed"


async def serve(sock: socket.socket, gather: Gather, admit: Admit, *, force_auth: bool) -> None:
    """Answer at `sock` until cancelled.

    Args:
        force_auth: this machine is asked for credentials as well.
    """

    async def answer(exchange: Exchange) -> None:
        if exchange.path != PATH:
            raise NotFound(f"This port serves {PATH} alone.")
        if exchange.method not in ("GET", "HEAD"):
            raise MethodNotAllowed
        asks = force_auth or exchange.proxied
        if asks or not is_local(exchange.peer, exchange.headers, http10=exchange.http10):
            await admit(exchange)
        kind, body = await asyncio.to_thread(text, await gather())
        exchange.respond(200, [(b"content-type", kind.encode())], body)

    async with asyncio.TaskGroup() as group:
        server = Server(asynchronous(answer, group))
        await server.listen(sock)
        try:
            await asyncio.Event().wait()
        finally:
            server.close()


def text(metrics: Iterable[Metric]) -> tuple[str, bytes]:
    """Content type and text of `metrics`, with this process's own."""
    # Only for those who are asked: 5 MiB, and too long to load while an event loop waits.
    from prometheus_client import CollectorRegistry, ProcessCollector, exposition
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    build = Metric("gpustack_build_info", "The version.", ("version",), {(__version__,): 1})
    families = []
    for metric in (build, *metrics):
        make: type[Any] = CounterMetricFamily if metric.counts else GaugeMetricFamily
        family = make(metric.name, metric.meaning, labels=metric.labels)
        for labels, value in metric.values.items():
            family.add_metric(labels, value)
        families.append(family)
    registry.register(_Ready(families))
    return exposition.CONTENT_TYPE_LATEST, exposition.generate_latest(registry)


@dataclass(eq=False)
class _Ready:
    """What `CollectorRegistry` wants: families that are collected already."""

    families: Sequence[Any]

    def collect(self) -> Sequence[Any]:
        return self.families
