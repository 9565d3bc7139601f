"""Whether the requests that an engine has make progress, by its own metrics."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from gpustack.lib.secrets import Secret
from gpustack.worker.supervisor.asking import ask

#: Of a metrics text. vLLM's has about 100 KB.
METRICS_BYTES: Final = 4 * 2**20
#: For its metrics to come, seconds.
PATIENCE_S: Final = 5.0


async def read_metrics(port: int, secret: Secret) -> bytes:
    """The engine's metrics; empty where it has none.

    Raises:
        TimeoutError: it is too busy to say so, or hangs.
        OSError: it does not listen any more.
    """
    answer = await ask(port, "/metrics", secret, limit_s=PATIENCE_S, at_most=METRICS_BYTES)
    return answer.body if answer.status == 200 else b""


def values(metrics: bytes, names: Iterable[str]) -> dict[str, float]:
    """PURE: of a Prometheus text, name -> the sum of its lines; a name that is not there has none.

    A line without a finite number is no line. Light: the text is not taken apart, since it is read
    for each of 64 engines all the time.
    """
    found: dict[str, float] = {}
    if pattern := _pattern(tuple(names)):
        for name, text in pattern.findall(metrics):
            if math.isfinite(number := float(text)):
                key = name.decode()
                found[key] = found.get(key, 0.0) + number
    return found


@lru_cache(maxsize=64)
def _pattern(names: tuple[str, ...]) -> re.Pattern[bytes] | None:
    if not names:
        return None
    any_name = b"|".join(re.escape(name.encode()) for name in names)
    number = rb"([-+]?[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?)(?=\s|$)"
    return re.compile(rb"^(" + any_name + rb")(?:\{[^\n]*?\})?[ \t]+" + number, re.M)


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at an engine's metrics.

    Attributes:
        requests: how many it has.
        counters: empty: its progress cannot be told.
    """

    requests: float
    counters: dict[str, float]


class Progress:
    """How long the requests of an engine have made none. PURE: time is an argument, seconds.

    Attributes:
        requests: how many it has, by the last look; None: its metrics did not come.
    """

    def __init__(self) -> None:
        self._counters: dict[str, float] | None = None
        self._since: float | None = None
        self.requests: float | None = None

    def see(self, sample: Sample, now: float) -> None:
        self.requests = sample.requests
        if sample.requests <= 0 or not sample.counters:
            self.forget()
        elif sample.counters != self._counters:
            self._counters, self._since = sample.counters, now

    def see_silence(self, now: float) -> None:
        """Its metrics did not come. Some engines hold them back while they compute."""
        self.requests = None
        if self._since is None:
            self._since = now

    def forget(self) -> None:
        """It is well: count anew."""
        self._counters = self._since = None

    def still_s(self, now: float) -> float:
        return 0.0 if self._since is None else now - self._since
