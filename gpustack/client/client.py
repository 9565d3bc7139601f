"""The API as typed methods: what agents, the command line and users' programs call."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from gpustack.client.failures import error_of
from gpustack.client.watching import follow
from gpustack.errors import GPUStackError, NotFound, Unavailable
from gpustack.schemas.base import Page
from gpustack.schemas.credentials import ApiKeyCreate, ApiKeyCreated
from gpustack.schemas.instances import Instance, InstanceStatus
from gpustack.schemas.models import Model, ModelCreate, ModelUpdate
from gpustack.schemas.users import User
from gpustack.schemas.watch import WatchEvent
from gpustack.schemas.workers import Heartbeat, Registered, Registration, Worker, WorkerStatus

T = TypeVar("T", bound=BaseModel)

#: Objects per page of a list.
PER_PAGE = 100


class Client:
    """Calls one server with one credential.

    Every method raises an error of `gpustack.errors`: the one that the server named, or
    `Unavailable` when there is no answer within `timeout_s` seconds.

    Args:
        base_url: of the server or its gateway, such as http://127.0.0.1:80.
        token: an API key, or a worker's credential; sent as a bearer token.
    """

    def __init__(self, base_url: str, token: str | None = None, *, timeout_s: float = 15.0) -> None:
        self.base_url = base_url.rstrip("/")
        self._http = httpx.AsyncClient(
            base_url=self.base_url,
            # Added up, not formatted: a `Secret` shows stars then.
            headers={"Authorization": "Bearer " + token} if token else {},
            timeout=timeout_s,
            trust_env=False,  # no proxy ever stands between server and workers
            # Loading the system's certificates costs tens of milliseconds.
            verify=self.base_url.startswith("https:"),
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

    # --- models --------------------------------------------------------------------------

    async def models(self) -> list[Model]:
        return await self._list("/v2/models", Model)

    async def model(self, id: int) -> Model:
        return await self._one("GET", f"/v2/models/{id}", Model)

    async def model_by_name(self, name: str) -> Model:
        """The model called `name`.

        Raises:
            NotFound: there is none.
        """
        named = await self._list("/v2/models", Model, name=name)
        found = next((model for model in named if model.name == name), None)
        if found is None:
            raise NotFound(f"no model is called {name}")
        return found

    async def create_model(self, model: ModelCreate) -> Model:
        return await self._one("POST", "/v2/models", Model, model)

    async def update_model(self, id: int, model: ModelUpdate) -> Model:
        return await self._one("PUT", f"/v2/models/{id}", Model, model)

    async def delete_model(self, id: int) -> None:
        await self._call("DELETE", f"/v2/models/{id}")

    # --- instances -----------------------------------------------------------------------

    async def instances(self) -> list[Instance]:
        return await self._list("/v2/model-instances", Instance)

    async def logs(
        self, id: int, *, tail: int | None = None, follow: bool = False, previous: bool = False
    ) -> AsyncGenerator[bytes, None]:
        """The end of the engine's log; with `follow` also what is added, without end.

        Args:
            tail: this many lines from the end; None: as many as the server sends unasked.
            previous: the log of the run before this one.
        """
        asked = {"follow": str(follow).lower(), "previous": str(previous).lower()}
        if tail is not None:
            asked["tail"] = str(tail)
        path = f"/v2/model-instances/{id}/logs"
        read_s = None if follow else self._http.timeout.read
        async with self._stream(path, asked, read_s=read_s) as answer:
            async for chunk in answer.aiter_bytes():
                yield chunk

    # --- workers, keys, users ------------------------------------------------------------

    async def workers(self) -> list[Worker]:
        return await self._list("/v2/workers", Worker)

    async def create_api_key(self, key: ApiKeyCreate) -> ApiKeyCreated:
        return await self._one("POST", "/v2/api-keys", ApiKeyCreated, key)

    async def me(self) -> User:
        return await self._one("GET", "/v2/users/me", User)

    # --- what agents say -----------------------------------------------------------------

    async def register(self, registration: Registration) -> Registered:
        """Join the cluster. The client's token is the cluster's join token."""
        return await self._one("POST", "/v2/workers/register", Registered, registration)

    async def announce(self, worker_id: int, registration: Registration) -> Registered:
        """Say again who this worker is. The client's token is the worker's credential."""
        path = f"/v2/workers/{worker_id}/registration"
        return await self._one("PUT", path, Registered, registration)

    async def heartbeat(self, worker_id: int, beat: Heartbeat) -> None:
        await self._call("POST", f"/v2/workers/{worker_id}/heartbeat", beat)

    async def report_worker(self, worker_id: int, status: WorkerStatus) -> None:
        await self._call("PUT", f"/v2/workers/{worker_id}/status", status)

    async def report_instance(self, instance_id: int, status: InstanceStatus) -> None:
        await self._call("PUT", f"/v2/model-instances/{instance_id}/status", status)

    # --- watching ------------------------------------------------------------------------

    async def watch(
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
        asked = {"kinds": ",".join(kinds)}
        if since is not None:
            asked["since"] = since
        async with self._stream("/v2/watch", asked, read_s=silence_s) as answer:
            async for line in answer.aiter_lines():
                if line:
                    yield _event(line)

    def follow(
        self, kinds: Sequence[str], since: str | None = None, *, silence_s: float = 30.0
    ) -> AsyncGenerator[WatchEvent, None]:
        """`watch` that never ends: see `client.watching.follow`."""
        return follow(lambda cursor: self.watch(kinds, cursor, silence_s=silence_s), since)

    # --- the wire ------------------------------------------------------------------------

    async def _list(self, path: str, kind: type[T], **filters: str) -> list[T]:
        items: list[T] = []
        page = 1
        while True:
            asked: dict[str, Any] = {"page": page, "perPage": PER_PAGE, **filters}
            got = _parsed(Page[kind], await self._call("GET", path, asked=asked))  # type: ignore[valid-type]
            items += got.items
            if page >= got.pagination.totalPage:
                return items
            page += 1

    async def _one(self, method: str, path: str, kind: type[T], body: BaseModel | None = None) -> T:
        return _parsed(kind, await self._call(method, path, body))

    async def _call(
        self,
        method: str,
        path: str,
        body: BaseModel | None = None,
        *,
        asked: dict[str, Any] | None = None,
    ) -> bytes:
        content = None if body is None else body.model_dump_json().encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            answer = await self._http.request(
                method, path, params=asked, content=content, headers=headers
            )
        except httpx.HTTPError as error:
            raise self._unavailable(error) from error
        if not answer.is_success:
            raise _failure(answer)
        return answer.content

    @asynccontextmanager
    async def _stream(
        self, path: str, asked: dict[str, str], *, read_s: float | None
    ) -> AsyncIterator[httpx.Response]:
        limits = httpx.Timeout(self._http.timeout.connect, read=read_s)
        try:
            async with self._http.stream("GET", path, params=asked, timeout=limits) as answer:
                if not answer.is_success:
                    await answer.aread()
                    raise _failure(answer)
                yield answer
        except httpx.HTTPError as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: httpx.HTTPError) -> Unavailable:
        why = str(error) or type(error).__name__  # time-outs carry no text
        return Unavailable(f"no answer from the server at {self.base_url}: {why}")


def _failure(answer: httpx.Response) -> GPUStackError:
    return error_of(answer.status_code, answer.content, answer.headers.get("retry-after"))


def _parsed(kind: type[T], content: bytes) -> T:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise GPUStackError(
            f"the server's answer is not what this version knows: {error}"
        ) from None


def _event(line: str) -> WatchEvent:
    try:
        return WatchEvent.model_validate(json.loads(line))
    except ValueError as error:
        raise Unavailable(f"the watch sent a line that is no event: {error}") from None
