"""Whether an engine works: it answers at its health path, and its requests get done.

Health alone says little. An engine can answer `/health` and fail its first request, and it can
answer `/health` while no request ever ends.
"""

import asyncio
import json
import logging
import re
from collections.abc import Callable
from enum import Enum
from typing import Final

from gpustack.backends.base import Limits, ProbeRequest
from gpustack.lib import platform
from gpustack.lib.secrets import Secret
from gpustack.lib.text import plain
from gpustack.worker.reconcile import Failure, Trouble
from gpustack.worker.supervisor.asking import Answer, ask
from gpustack.worker.supervisor.health import answers
from gpustack.worker.supervisor.progress import Progress, Sample, read_metrics, values
from gpustack.worker.supervisor.records import Record

logger = logging.getLogger(__name__)

#: Seconds between questions to an engine that starts: it may answer 15 ms after its spawn.
FIRST_POLL_S, SLOWEST_POLL_S = 0.01, 0.5
#: First requests that may fail before the engine counts as one that fails them.
FIRST_TRIES: Final = 3
ANSWER_BYTES: Final = 64 * 1024
#: Of an engine's own words on why it failed a request.
REASON_CHARS: Final = 300


class Verdict(Enum):
    """What an answer to a probe request says of the engine."""

    WORKS = "works"
    LATER = "later"  # it is not ready for it, or has too much to do
    FAILS = "fails"
    SILENT = "silent"  # it had all the time that was given
    UNKNOWN = "unknown"  # it would not have this request: others may do well


def judge(answer: Answer, model: str) -> Verdict:
    """PURE: what the answer to the smallest request for `model` says.

    2xx: it works. 429 and 503: not now. 401 and 403: it does not know its own secret, so
    gateways would fare no better. 404 that quotes the model: it serves it under another name.
    Every other 4xx and 501: it listens and has judged this one request (a path that it lacks, a
    field that it wants otherwise): no proof against it. What is left is a request that failed.
    """
    if 200 <= answer.status < 300:
        return Verdict.WORKS
    if answer.status in (429, 503):
        return Verdict.LATER
    if answer.status in (401, 403):
        return Verdict.FAILS
    if answer.status == 404 and _quotes(answer.body, model):
        return Verdict.FAILS
    if 400 <= answer.status < 500 or answer.status == 501:
        return Verdict.UNKNOWN
    return Verdict.FAILS


def _quotes(body: bytes, model: str) -> bool:
    """Whether the model's name stands in quotes or backticks: a name may be any word."""
    name = re.escape(model.encode())
    return re.search(rb"[`'\"]" + name + rb"\\?[`'\"]", body) is not None


class Prober:
    """Asks one engine, until it is not well."""

    def __init__(self, record: Record, secret: Secret, limits: Limits) -> None:
        self._record = record
        self._secret = secret
        self._limits = limits
        self._progress = Progress()
        self._counted = ""  # what the number of its requests is the number of
        self._now = asyncio.get_running_loop().time

    async def until_ready(self) -> Failure | None:
        """Return once it has answered its health path and one real request; else why it has not."""
        limits, wait_s = self._limits, FIRST_POLL_S
        deadline = self._now() + limits.start_s
        while not await answers(self._record.port, self._record.health_path, self._secret):
            if self._now() >= deadline:
                return Failure(
                    Trouble.NOT_READY, f"the engine did not answer within {limits.start_s:g} s"
                )
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 1.5, SLOWEST_POLL_S)
        if (probe := self._record.probe) is None:
            return None
        why = ""
        for _ in range(FIRST_TRIES):
            verdict, why = await self._ask(probe, limits.first_s, later_until=deadline)
            if verdict is Verdict.UNKNOWN:
                logger.warning("the first request proves nothing: it %s", why)
            if verdict in (Verdict.WORKS, Verdict.UNKNOWN):
                return None
            if verdict in (Verdict.LATER, Verdict.SILENT):
                break  # it had its time
            await asyncio.sleep(SLOWEST_POLL_S)
        sentence = f"{self._record.health_path} answers, but the first request {why}"
        return Failure(Trouble.UNFIT, sentence)

    async def until_unwell(self, answered: Callable[[], None]) -> Failure:
        """Return when it answers no more, or has requests and gets none of them on.

        Args:
            answered: told each time that it has answered its health path.
        """
        limits, misses = self._limits, 0
        look_at = self._now() + limits.look_s
        while misses < limits.misses:
            record = self._record
            if await answers(
                record.port, record.health_path, self._secret, limit_s=limits.patience_s
            ):
                misses = 0
                answered()
                if self._now() >= look_at:
                    look_at = self._now() + limits.look_s
                    if (why := await self._why_stuck()) is not None:
                        return Failure(Trouble.UNHEALTHY, why)
            else:
                misses += 1
            await asyncio.sleep(limits.poll_s)
        return Failure(Trouble.UNHEALTHY, f"the engine did not answer {misses} times in a row")

    async def _ask(
        self, probe: ProbeRequest, limit_s: float, *, later_until: float
    ) -> tuple[Verdict, str]:
        """What a real request says of the engine; one that is put off is asked again."""
        while True:
            verdict, why = await self._ask_once(probe, limit_s)
            if verdict is not Verdict.LATER or self._now() >= later_until:
                return verdict, why
            await asyncio.sleep(SLOWEST_POLL_S)

    async def _ask_once(self, probe: ProbeRequest, limit_s: float) -> tuple[Verdict, str]:
        way = f"({probe.method} {probe.path})"
        try:
            answer = await ask(
                self._record.port,
                probe.path,
                self._secret,
                method=probe.method,
                body=probe.body,
                limit_s=limit_s,
                at_most=ANSWER_BYTES,
            )
        except TimeoutError:
            return Verdict.SILENT, f"{way} got no answer in {limit_s:g} s"
        except OSError as error:
            return Verdict.FAILS, f"{way} got no answer: {error.strerror or error}"
        said = reason(answer.body, secret=self._secret.reveal())
        why = f"{way} got {answer.status}"
        verdict = judge(answer, str(probe.body.get("model", "")))
        return verdict, f"{why}: {said}" if said else why

    async def _why_stuck(self) -> str | None:
        """Evidence that its requests make no progress; None: they do, or nobody can tell."""
        record, limits = self._record, self._limits
        if not record.busy_gauges or (probe := record.probe) is None:
            return None
        await self._see()
        still_s = self._progress.still_s(self._now())
        if still_s < limits.stuck_s:
            return None
        until = self._now() + limits.probe_s
        verdict, why = await self._ask(probe, limits.probe_s, later_until=until)
        if verdict in (Verdict.WORKS, Verdict.UNKNOWN):
            self._progress.forget()
            return None
        await self._see()
        if self._progress.still_s(self._now()) < limits.stuck_s:
            return None  # it was busy: something has moved meanwhile
        seen = self._progress.requests
        what = "no word from its metrics" if seen is None else f"{seen:g} {self._counted}"
        return f"{what} and no token for {still_s:.0f} s; a probe request {why}"

    async def _see(self) -> None:
        record = self._record
        try:
            metrics = await read_metrics(record.port, self._secret)
        except TimeoutError:
            self._progress.see_silence(self._now())
        except OSError:
            self._progress.forget()  # its health path says more
        else:
            known = values(metrics, (*record.busy_gauges, *record.progress_counters))
            gauges = [known.pop(name) for name in record.busy_gauges if name in known]
            # llama-box does not say how many requests it has. Who is connected may be idle: so it
            # costs a real request now and then, never the engine.
            requests = sum(gauges) if gauges else float(platform.connections_to(record.port) or 0)
            self._counted = "requests in progress" if gauges else "connections open"
            self._progress.see(Sample(requests, known), self._now())


def reason(body: bytes, *, secret: str = "") -> str:
    """PURE: why an engine failed a request, by its answer: one line, short, without its secret."""
    try:
        said = json.loads(body)
        error = said.get("error", said)
        text = error if isinstance(error, str) else error.get("message") or error.get("detail")
    except (ValueError, AttributeError, RecursionError):
        text = body[: 4 * REASON_CHARS].decode(errors="replace")
    line = " ".join(plain(str(text or "")).split())
    return (line.replace(secret, "********") if secret else line)[:REASON_CHARS]
