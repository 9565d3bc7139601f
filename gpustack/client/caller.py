"""Calls to one server: requests, answers, streams."""

import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import date
from types import TracebackType
from typing import Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from gpustack.client.failures import error_of
from gpustack.client.watching import follow
from gpustack.errors import BadRequest, GPUStackError, Unavailable
from gpustack.lib import trust
from gpustack.schemas import wire
from gpustack.schemas.watch import WatchEvent

T = TypeVar("T", bound=BaseModel)

#: What a filter may be; None: it is not given. Of several values, any may hold.
Filter = str | int | bool | date | Sequence[str] | Sequence[int] | None


class Caller:
    """Calls one server with one credential.

    Every call raises an error of `gpustack.errors`: the one that the server named, or
    `Unavailable` when there is no answer within `timeout_s` seconds.

    Args:
        base_url: of the server or its gateway, such as http://127.0.0.1:80.
        token: an API key, or a worker's credential; sent as a bearer token.
        tls: whom to believe that it is the server; None: as this system has it.
    """

    def __init__(
        self,
        base_url: str,
        token: str | None = None,
        *,
        timeout_s: float = 15.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.timeout_s = timeout_s
        self._http = httpx.AsyncClient(
            base_url=self.base_url,
            # Added up, not formatted: a `Secret` shows stars then.
            headers={"Authorization": "Bearer " + token} if token else {},
            timeout=timeout_s,
            trust_env=False,  # no proxy ever stands between server and workers
            # Loading the system's authorities costs tens of milliseconds.
            verify=(tls or trust.authorities()) if self.base_url.startswith("https:") else False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    def watch(
        self, kinds: Sequence[str], since: str | None = None, *, silence_s: float = 30.0
    ) -> AsyncGenerator[WatchEvent, None]:
        """Events of one connection, until the server ends it.

        Args:
            kinds: words of `schemas.wire`.
            since: a cursor seen before; None asks for the whole list first.
            silence_s: the server says something every 10 s; silent for longer, it is gone.

        Raises:
            Unavailable: no connection, or it broke, or fell silent.
        """
        asked = {"kinds": ",".join(kinds), "since": since}
        return self.watch_at("/v2/watch", asked, silence_s=silence_s)

    async def watch_at(
        self, path: str, asked: Mapping[str, Filter], *, silence_s: float = 30.0
    ) -> AsyncGenerator[WatchEvent, None]:
        """`watch` of one collection, which shows whoever may list it what is theirs."""
        async with self.stream(path, asked, read_s=silence_s) as answer:
            async for line in answer.aiter_lines():
                if line:
                    yield _event(line)

    def follow(
        self, kinds: Sequence[str], since: str | None = None, *, silence_s: float = 30.0
    ) -> AsyncGenerator[WatchEvent, None]:
        """`watch` that never ends: see `client.watching.follow`.

        Raises:
            BadRequest: nobody knows such a kind; waiting for it would never end either.
        """
        if unknown := sorted(set(kinds) - wire.KINDS):
            known = ", ".join(sorted(wire.KINDS))
            raise BadRequest(f"kinds: want some of {known}, got {', '.join(unknown)}")
        return follow(lambda cursor: self.watch(kinds, cursor, silence_s=silence_s), since)

    async def one(
        self,
        method: str,
        path: str,
        kind: type[T],
        body: BaseModel | None = None,
        *,
        asked: Mapping[str, Filter] | None = None,
    ) -> T:
        """What the server answers, as a `kind`."""
        return parsed(kind, await self.call(method, path, body, asked=asked))

    async def call(
        self,
        method: str,
        path: str,
        body: BaseModel | None = None,
        *,
        asked: Mapping[str, Filter] | None = None,
    ) -> bytes:
        """The body of the server's answer."""
        content = None if body is None else body.model_dump_json().encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            answer = await self._http.request(
                method, path, params=query(asked), content=content, headers=headers
            )
        except httpx.HTTPError as error:
            raise self._unavailable(error) from error
        if not answer.is_success:
            raise _failure(answer)
        return answer.content

    @asynccontextmanager
    async def stream(
        self, path: str, asked: Mapping[str, Filter], *, read_s: float | None
    ) -> AsyncIterator[httpx.Response]:
        """An answer whose body is still to come; silent for `read_s` seconds, it is given up."""
        limits = httpx.Timeout(self._http.timeout.connect, read=read_s)
        try:
            async with self._http.stream(
                "GET", path, params=query(asked), timeout=limits
            ) as answer:
                if not answer.is_success:
                    await answer.aread()
                    raise _failure(answer)
                yield answer
        except httpx.HTTPError as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: httpx.HTTPError) -> Unavailable:
        why = trust.why(error, self._http.base_url.host)
        return Unavailable(f"no answer from the server at {self.base_url}: {why}")


def query(asked: Mapping[str, Filter] | None) -> dict[str, str | list[str]]:
    """Filters as a URL has them."""
    return {
        name: list(map(_word, value)) if isinstance(value, list | tuple) else _word(value)
        for name, value in (asked or {}).items()
        if value is not None
    }


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _failure(answer: httpx.Response) -> GPUStackError:
    return error_of(answer.status_code, answer.content, answer.headers.get("retry-after"))


def parsed(kind: type[T], content: bytes) -> T:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise not_known(error) from None


def not_known(error: ValidationError) -> GPUStackError:
    return GPUStackError(f"the server's answer is not what this version knows: {error}")


def _event(line: str) -> WatchEvent:
    try:
        return WatchEvent.model_validate(json.loads(line))
    except ValueError as error:
        raise Unavailable(f"the watch sent a line that is no event: {error}") from None
