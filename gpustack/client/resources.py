"""The resources of the API, each with what it alone can be asked."""

import builtins
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from pydantic import RootModel

from gpustack.client.caller import Filter
from gpustack.client.collections import (
    Collection,
    Creates,
    Deletes,
    Follows,
    Listed,
    Named,
    Resource,
    Updates,
    list_of,
)
from gpustack.schemas.access import (
    Group,
    GroupCreate,
    GroupMember,
    GroupUpdate,
    MembersAdd,
    ModelAccess,
    ModelAccessUpdate,
)
from gpustack.schemas.audit import Audited, AuditEntry
from gpustack.schemas.credentials import (
    ApiKey,
    ApiKeyCreate,
    ApiKeyCreated,
    ApiKeyUpdate,
    JoinToken,
    JoinTokenCreate,
    JoinTokenCreated,
)
from gpustack.schemas.dashboard import Dashboard, ModelUsage, UsageStats
from gpustack.schemas.devices import GPUDevice
from gpustack.schemas.engines import Engine, Engines
from gpustack.schemas.events import Event, EventKind
from gpustack.schemas.instances import Instance
from gpustack.schemas.model_files import ModelFile, ModelFileCreate
from gpustack.schemas.models import (
    Deletions,
    Model,
    ModelCreate,
    ModelUpdate,
    ModelVersion,
    Rollback,
)
from gpustack.schemas.settings import Setting
from gpustack.schemas.usage import UsageEntry, UsageSum
from gpustack.schemas.users import (
    MeUpdate,
    PasswordReset,
    PasswordSet,
    User,
    UserCreate,
    UserCreated,
    UserUpdate,
)
from gpustack.schemas.workers import Cordon, Worker, WorkerUpdate


class Models(
    Named[Model], Follows[Model], Creates[ModelCreate, Model], Updates[Model, ModelUpdate], Deletes
):
    """What users deploy."""

    PATH, KIND, CREATED = "/v2/models", Model, Model

    async def patch(self, id: int, changes: Mapping[str, Any]) -> Model:
        """Change the fields that are named; None means the default.

        With `generation` among them: only if that is still the model's.
        """
        patch = RootModel[dict[str, Any]](dict(changes))
        return await self._caller.one("PATCH", f"{self.PATH}/{id}", Model, patch)

    async def instances(
        self, id: int, *, limit: int | None = None, **filters: Filter
    ) -> builtins.list[Instance]:
        """The model's copies."""
        path = f"{self.PATH}/{id}/instances"
        return await list_of(self._caller, path, Instance, limit, filters)

    async def versions(self, id: int) -> builtins.list[ModelVersion]:
        """What the model's instances were started from, the newest first."""
        return await list_of(self._caller, f"{self.PATH}/{id}/versions", ModelVersion, None, {})

    async def roll_back(self, id: int, to: int | None = None) -> Model:
        """Want an earlier version again.

        Args:
            to: the generation that it came with; None: the newest that says something else.
        """
        path = f"{self.PATH}/{id}/rollback"
        return await self._caller.one("POST", path, Model, Rollback(to=to))

    async def delete_many(self, ids: Sequence[int]) -> Deletions:
        """Delete up to 100 models; answers for each what became of it."""
        asked = {"ids": ",".join(map(str, ids))}
        return await self._caller.one("DELETE", self.PATH, Deletions, asked=asked)

    async def access(self, id: int) -> ModelAccess:
        """To whom the model is granted."""
        return await self._caller.one("GET", f"{self.PATH}/{id}/access", ModelAccess)

    async def grant(
        self, id: int, user_ids: Sequence[int] = (), group_ids: Sequence[int] = ()
    ) -> ModelAccess:
        """Grant the model to these users and groups, and to no others."""
        wanted = ModelAccessUpdate(user_ids=[*user_ids], group_ids=[*group_ids])
        return await self._caller.one("PUT", f"{self.PATH}/{id}/access", ModelAccess, wanted)


class Instances(Collection[Instance], Follows[Instance], Deletes):
    """Copies of models."""

    PATH, KIND = "/v2/model-instances", Instance

    async def retry(self, id: int) -> None:
        """Start a failed one again now, without waiting for its back-off."""
        await self._caller.call("POST", f"{self.PATH}/{id}/retry")

    async def logs(
        self,
        id: int,
        *,
        tail: int | None = None,
        follow: bool = False,
        previous: int = 0,
        since: str | None = None,
    ) -> AsyncGenerator[bytes, None]:
        """The engine's own output, byte for byte; with `follow` until the instance is gone.

        Args:
            tail: this many lines from the end, -1 for all; None: the last 1000, or all `since`.
            previous: of the run so many runs before this one.
            since: a duration such as "10m", or a time (RFC 3339).
        """
        asked: dict[str, Filter] = {
            "follow": follow, "previous": previous or None, "tail": tail, "since": since
        }  # fmt: skip
        read_s = None if follow else self._caller.timeout_s
        async with self._caller.stream(f"{self.PATH}/{id}/logs", asked, read_s=read_s) as answer:
            async for chunk in answer.aiter_bytes():
                yield chunk


class Workers(Named[Worker], Follows[Worker], Updates[Worker, WorkerUpdate], Deletes):
    """Machines that run agents."""

    PATH, KIND = "/v2/workers", Worker

    async def cordon(self, id: int, reason: str | None = None) -> Worker:
        """Let no new instances come to it.

        Args:
            reason: for people; None: the one that there is stays.
        """
        path = f"{self.PATH}/{id}/cordon"
        return await self._caller.one("POST", path, Worker, Cordon(reason=reason))

    async def drain(self, id: int, reason: str | None = None) -> Worker:
        """Let no new instances come, and have those that are there leave: see `Worker.leaving`."""
        path = f"{self.PATH}/{id}/drain"
        return await self._caller.one("POST", path, Worker, Cordon(reason=reason))

    async def uncordon(self, id: int) -> Worker:
        """Let new instances come to it again; a drain ends."""
        return await self._caller.one("POST", f"{self.PATH}/{id}/uncordon", Worker)

    async def engines(self, id: int) -> builtins.list[Engine]:
        """What runs there now, as the worker's agent says."""
        return (await self._caller.one("GET", f"{self.PATH}/{id}/engines", Engines)).root


class GPUDevices(Listed[GPUDevice]):
    """GPUs and NPUs of all workers."""

    PATH, KIND = "/v2/gpu-devices", GPUDevice

    async def get(self, id: str) -> GPUDevice:
        """The device `<worker>:<type>:<index>`.

        Raises:
            NotFound: there is none such.
        """
        return await self._caller.one("GET", f"{self.PATH}/{quote(id, safe=':')}", GPUDevice)


class ModelFiles(Collection[ModelFile], Follows[ModelFile], Creates[ModelFileCreate, ModelFile]):
    """Models' files on workers. To make one is to have it fetched."""

    PATH, KIND, CREATED = "/v2/model-files", ModelFile, ModelFile

    async def reset(self, id: int) -> ModelFile:
        """Have it fetched again."""
        return await self._caller.one("POST", f"{self.PATH}/{id}/reset", ModelFile)

    async def delete(self, id: int, *, cleanup: bool = False) -> None:
        """Forget it; with `cleanup`, once the worker has removed it from its disk."""
        await self._caller.call("DELETE", f"{self.PATH}/{id}", asked={"cleanup": cleanup})


class Users(Creates[UserCreate, UserCreated], Updates[User, UserUpdate], Deletes):
    PATH, KIND, CREATED = "/v2/users", User, UserCreated

    async def me(self) -> User:
        """Whose credential this is."""
        return await self._caller.one("GET", f"{self.PATH}/me", User)

    async def update_me(self, wanted: MeUpdate) -> User:
        return await self._caller.one("PUT", f"{self.PATH}/me", User, wanted)

    async def reset_password(self, id: int, password: str | None = None) -> str | None:
        """Set another's password; the user's sessions end.

        Args:
            password: None: one is made, which is answered and must be changed at the next login.
        """
        wanted = PasswordReset(password=password)
        path = f"{self.PATH}/{id}/password"
        return (await self._caller.one("PUT", path, PasswordSet, wanted)).password


class Groups(Named[Group], Creates[GroupCreate, Group], Updates[Group, GroupUpdate], Deletes):
    """Users to whom models are granted together."""

    PATH, KIND, CREATED = "/v2/groups", Group, Group

    async def members(
        self, id: int, *, limit: int | None = None, **filters: Filter
    ) -> builtins.list[GroupMember]:
        return await list_of(self._caller, f"{self.PATH}/{id}/members", GroupMember, limit, filters)

    async def add(self, id: int, user_ids: Sequence[int]) -> None:
        """Make users members, up to 1000 at a time."""
        wanted = MembersAdd(user_ids=[*user_ids])
        await self._caller.call("POST", f"{self.PATH}/{id}/members", wanted)

    async def remove(self, id: int, user_id: int) -> None:
        """Make a user no member any more."""
        await self._caller.call("DELETE", f"{self.PATH}/{id}/members/{user_id}")


class ApiKeys(
    Follows[ApiKey], Creates[ApiKeyCreate, ApiKeyCreated], Updates[ApiKey, ApiKeyUpdate], Deletes
):
    """The user's own keys."""

    PATH, KIND, CREATED = "/v2/api-keys", ApiKey, ApiKeyCreated


class JoinTokens(Listed[JoinToken], Creates[JoinTokenCreate, JoinTokenCreated], Deletes):
    """With what workers register."""

    PATH, KIND, CREATED = "/v2/join-tokens", JoinToken, JoinTokenCreated


class Usage(Listed[UsageEntry]):
    """Requests, the newest first; of others only for administrators."""

    PATH, KIND = "/v2/usage", UsageEntry

    async def sums(
        self, group_by: Sequence[str] = (), *, limit: int | None = None, **filters: Filter
    ) -> builtins.list[UsageSum]:
        """What requests come to, by any of date, model, user, credential and operation."""
        asked: dict[str, Filter] = {"group_by": builtins.list(group_by), **filters}
        return await list_of(self._caller, f"{self.PATH}/sums", UsageSum, limit, asked)


class Dashboards(Resource):
    """The cluster at a glance."""

    PATH = "/v2/dashboard"

    async def get(self) -> Dashboard:
        return await self._caller.one("GET", self.PATH, Dashboard)

    async def usage(self, **filters: Filter) -> ModelUsage:
        """By the day, and the users with the most tokens."""
        return await self._caller.one("GET", f"{self.PATH}/usage", ModelUsage, asked=filters)

    async def usage_stats(self, **filters: Filter) -> UsageStats:
        """By the day."""
        path = f"{self.PATH}/usage/stats"
        return await self._caller.one("GET", path, UsageStats, asked=filters)


class Events(Listed[Event]):
    """What happened to objects, the newest first."""

    PATH, KIND = "/v2/events", Event

    async def of(
        self, kind: EventKind, id: int, *, limit: int | None = None, **filters: Filter
    ) -> builtins.list[Event]:
        """What happened to one object, which may be gone."""
        return await list_of(self._caller, f"/v2/{kind}/{id}/events", Event, limit, filters)


class AuditLog(Listed[AuditEntry]):
    """Who changed what, the newest first."""

    PATH, KIND = "/v2/audit", AuditEntry

    async def verify(self) -> Audited:
        """Whether it is as it was written."""
        return await self._caller.one("GET", f"{self.PATH}/verify", Audited)


class Settings(Listed[Setting]):
    """The start options of the server's node, as they are in effect."""

    PATH, KIND = "/v2/settings", Setting
