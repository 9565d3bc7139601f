"""Nobody changes a role, an owner or what is another's by a field that a body should not have.

Every route that takes a body gets a valid one with each name that any table or schema has, one at a
time, all at once, and as a query. Then the rows are compared with those before: `MAY_CHANGE` is all
that may differ.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, get_args
from urllib.parse import urlencode

import httpx
import pytest
import sqlmodel
from pydantic import BaseModel
from sqlalchemy import inspect, select
from sqlmodel import SQLModel

from gpustack import schemas
from gpustack.schemas.credentials import CredentialKind
from gpustack.server.db import tables
from gpustack.server.db.database import Database
from tests.server.conftest import GATEWAY, JOIN, LOCAL_ADMIN, Plane
from tests.support.access import BODIES, PASSWORD, QUERIES, Stage

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("databases", ["sqlite"], indirect=True, scope="session"),
]

#: Bodies that are no objects.
TEXTS: Final = {"PUT /debug/log_level", "PUT /v2/workers/{worker_id}/log-level"}
#: No worker has such a label, so what is made here is placed nowhere.
NOWHERE: Final = {"stage": "none"}
#: Where what others call routes with would not be valid.
VALID: Final[Mapping[str, Callable[[Stage], Any]]] = {
    **BODIES,
    "POST /v2/users": lambda s: {"username": s.new("u"), "password": PASSWORD},
    "PUT /v2/users/{user_id}/password": lambda s: {"password": PASSWORD},
    "POST /v2/workers/register": lambda s: s.machine(s.new("w")),
    "POST /v2/models": lambda s: s.model(worker_selector=NOWHERE),
    "PUT /v2/models/{model_id}": lambda s: (
        s.versions | {"env": {"A": s.new("v")}, "worker_selector": NOWHERE}
    ),
    "PUT /v2/workers/{worker_id}": lambda s: {"labels": {"a": "b"}},
    "POST /v2/apply": lambda s: {"models": [s.model(worker_selector=NOWHERE)]},
}
#: What else people call themselves when they want to be more.
MADE_UP: Final = ("isAdmin", "is_superuser", "roles", "groups", "permissions", "user", "__class__")

CORDON: Final = "workers.scheduling workers.scheduling_reason workers.generation"
#: (route, who) -> what may differ afterwards: `table.column`, `+table` of a new row. Rows that have
#: an owner are the principal's own before and after. Whoever is not here may change nothing.
MAY_CHANGE: Final[Mapping[tuple[str, str], str]] = {
    ("POST /v2/api-keys", "user"): "+credentials",
    ("PUT /v2/api-keys/{key_id}", "user"): (
        "credentials.name credentials.description credentials.scopes"
        " credentials.allowed_model_names credentials.generation"
    ),
    ("PUT /v2/users/me", "user"): "users.full_name users.generation",
    ("POST /v2/api-keys", "admin"): "+credentials",
    ("PUT /v2/users/me", "admin"): "users.full_name users.generation",
    # Administrators say who is one; never a digest, an id, or when something was made.
    ("POST /v2/users", "admin"): "+users",
    ("PUT /v2/users/{user_id}", "admin"): (
        "users.username users.full_name users.is_admin users.is_active users.generation"
        " users.require_password_change users.password_hash -credentials"
    ),
    ("PUT /v2/users/{user_id}/password", "admin"): (
        "users.password_hash users.require_password_change users.generation -credentials"
    ),
    ("POST /v2/join-tokens", "admin"): "+credentials -credentials",  # those that have ended go
    ("POST /v2/cluster-token/rotate", "admin"): "cluster.token_digest",
    ("POST /v2/models", "admin"): "+models +model_versions",
    ("PUT /v2/models/{model_id}", "admin"): (
        "+model_versions models.description models.replicas models.generation"
        " models.placement_strategy models.worker_selector models.restart_on_error"
        " models.access_policy"
    ),
    ("PATCH /v2/models/{model_id}", "admin"): (
        "+model_versions models.description models.replicas models.generation"
        " models.placement_strategy models.worker_selector models.restart_on_error"
        " models.access_policy"
    ),
    ("PUT /v2/models/{model_id}/access", "admin"): (
        "+model_users -model_users +model_groups -model_groups"
    ),
    ("POST /v2/groups", "admin"): "+user_groups",
    ("PUT /v2/groups/{group_id}", "admin"): (
        "user_groups.name user_groups.description user_groups.generation"
    ),
    ("POST /v2/groups/{group_id}/members", "admin"): "+group_members",
    ("POST /v2/models/{model_id}/rollback", "admin"): "+model_versions models.generation",
    ("POST /v2/apply", "admin"): (  # with `prune` it deletes what is not in it
        "+models +model_versions -models -model_versions models.deleting models.generation"
    ),
    ("PUT /v2/workers/{worker_id}", "admin"): "workers.admin_labels workers.generation",
    ("POST /v2/workers/{worker_id}/cordon", "admin"): CORDON,
    ("POST /v2/workers/{worker_id}/drain", "admin"): CORDON,
    ("POST /v2/workers/{worker_id}/uncordon", "admin"): CORDON,
    ("POST /v2/model-files", "admin"): "+model_files",
    ("POST /v2/model-files/{file_id}/reset", "admin"): "model_files.generation",
    ("POST /v2/workers/register", "join"): "+workers +credentials",
    # Workers say what is true of them; never whose something is, nor what is wanted.
    ("PUT /v2/workers/{worker_id}/registration", "worker"): (
        "workers.hostname workers.ip workers.port workers.version workers.labels"
        " workers.system_reserved_ram_bytes workers.system_reserved_vram_bytes workers.machine_id"
        " workers.boot_id workers.run_id"
    ),
    ("PUT /v2/workers/{worker_id}/status", "worker"): ("workers.facts +devices -devices"),
    ("PUT /v2/model-instances/{instance_id}/status", "worker"): (
        "model_instances.reported_state model_instances.state_message model_instances.port"
        " model_instances.observed_generation model_instances.pid model_instances.restart_count"
        " model_instances.download_progress"
    ),
    ("POST /v2/workers/{worker_id}/model-files", "worker"): "+model_files",
    ("PUT /v2/model-files/{file_id}/status", "worker"): (
        "model_files.reported_state model_files.state_message model_files.observed_generation"
        " model_files.size model_files.download_progress model_files.resolved_paths"
    ),
    ("POST /v2/usage", "gateway"): "usage_spools.sequence +usage_spools",
}
#: What the server writes by itself, whoever asked for what.
ITS_OWN: Final = {
    "changes", "counter", "events", "audit_log", "audit_chain", "leases", "load_samples",
}  # fmt: skip
ITS_OWN_COLUMNS: Final = {
    "revision", "updated_at", "last_used_at", "heartbeat_at", "silent", "reasons", "problem",
    "profile", "rollout_message", "devices_used", "gpu_percent", "vram_used_bytes", "cpu_percent",
    "memory_used_bytes", "host_used",
}  # fmt: skip
#: Models get instances, after a while, and these a place.
PLACED: Final = {
    f"model_instances.{column}"
    for column in ("worker_id", "claim", "secret", "deleting", "generation")
} | {"+model_instances", "-model_instances"}

Rows = dict[str, dict[Any, dict[str, Any]]]  # table -> key -> row


def names() -> dict[str, Any]:
    """Every name of a field of any table or schema, with a value that would mean something."""
    found: dict[str, Any] = dict.fromkeys(MADE_UP, True)
    for module in pkgutil.iter_modules(schemas.__path__):
        for each in vars(importlib.import_module(f"{schemas.__name__}.{module.name}")).values():
            if isinstance(each, type) and issubclass(each, BaseModel):
                for name, field in each.model_fields.items():
                    found[name] = _value(_plain(field.annotation))
    for mapper in SQLModel._sa_registry.mappers:
        for column in mapper.columns:
            found[column.key] = _value(_type_of(column))
    assert {"is_admin", "user_id", "digest", "password_hash", "scopes", "secret"} <= {*found}
    return found


def _plain(annotation: Any) -> Any:
    """The type that is not None of those that it may be."""
    options = [one for one in get_args(annotation) if one is not type(None)]
    return _plain(options[0]) if type(None) in get_args(annotation) else annotation


def _type_of(column: Any) -> Any:
    try:
        return column.type.python_type
    except NotImplementedError:
        return str


def _value(kind: Any) -> Any:
    origin = getattr(kind, "__origin__", kind)
    for types, value in (
        (bool, True), (int, 1), (float, 1.0), (list, ["*"]), (dict, {"a": "b"}),
        (datetime, "2001-01-01T00:00:00Z"),
    ):  # fmt: skip
        if origin is types:
            return value
    return "admin"


async def read(db: Database) -> Rows:
    found: Rows = {}
    async with db.read() as session:
        connection = await session.connection()
        for mapper in SQLModel._sa_registry.mappers:
            table: Any = mapper.local_table
            if table.name in ITS_OWN:
                continue
            key = [one.name for one in inspect(mapper.class_).primary_key]
            found[table.name] = {
                tuple(row[name] for name in key): dict(row)
                for row in (await connection.execute(select(table))).mappings()
            }
    return found


def changes(before: Rows, after: Rows) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """What differs: `table.column`, `+table` or `-table`, with the row as it was and is."""
    for table, now in after.items():
        old = before[table]
        for key in {*old, *now}:
            was, is_now = old.get(key, {}), now.get(key, {})
            if not was or not is_now:
                yield f"{'+' if is_now else '-'}{table}", was, is_now
                continue
            for column in was:
                if was[column] != is_now[column] and column not in ITS_OWN_COLUMNS:
                    yield f"{table}.{column}", was, is_now


#: Of rows with an owner: the column that says whose they are.
OWNED: Final = {
    "users": "id", "credentials": "user_id", "workers": "id", "model_instances": "worker_id",
    "model_files": "worker_id", "devices": "worker_id",
}  # fmt: skip


def _has_ended(row: dict[str, Any]) -> bool:
    """Whether it is a credential that the server removes by itself, by and by."""
    return row["expires_at"] is not None and row["expires_at"] <= datetime.now(UTC)


class Try:
    """A control plane, and whoever tries."""

    def __init__(self, plane: Plane, stage: Stage, me: Mapping[str, int]) -> None:
        self.plane = plane
        self.stage = stage
        self._me = me  # principal -> its id: a user's or a worker's
        self._before: Rows = {}

    async def look(self) -> None:
        self._before = await read(self.plane.db)

    async def wrong(self, route: str, who: str) -> list[str]:
        """What has changed since the last look that may not."""
        alike = {"other": "user", "worker2": "worker"}.get(who, who)
        may = {*MAY_CHANGE.get((route, alike), "").split()}
        before, self._before = self._before, await read(self.plane.db)
        found = []
        for what, was, is_now in changes(before, self._before):
            if what in PLACED and who == "admin":
                continue
            if what == "-credentials" and _has_ended(was):
                continue
            if what not in may:
                found.append(f"{what}: {was} -> {is_now}")
            column = OWNED.get(what.lstrip("+-").partition(".")[0])
            mine = self._me.get(who)
            if column and mine is not None and {r[column] for r in (was, is_now) if r} != {mine}:
                found.append(f"{what} of somebody else: {was} -> {is_now}")
            if what == "+credentials" and is_now["kind"] != {
                "join": CredentialKind.WORKER,
                "admin": is_now["kind"] if route == "POST /v2/join-tokens" else CredentialKind.KEY,
            }.get(who, CredentialKind.KEY):
                found.append(f"a credential of another kind: {is_now}")
        return found

    async def all_of(
        self, route: str, who: str, make: Callable[[Stage], Any], all_names: dict[str, Any]
    ) -> list[str]:
        """Each name one by one, all at once, and all as a query. What has changed that may not."""
        answer = await self.ask(route, who, make(self.stage))
        # What is another's is looked for once the body was read.
        valid = answer.is_success or answer.status_code in {403, 404}
        assert valid, f"{route} as {who}: this body is not valid: {answer.text}"
        found = await self.wrong(route, who)
        for name, value in all_names.items():
            for more in [{name: value}] + [{name: None}] * (who != "admin"):
                for body in bodies(make(self.stage), more):
                    if (await self.ask(route, who, body)).is_success:
                        found += [f"with {more}: {one}" for one in await self.wrong(route, who)]
        for body in bodies(make(self.stage), all_names):
            await self.ask(route, who, body)
        query = urlencode({name: str(value) for name, value in names().items()})
        await self.ask(route, who, make(self.stage), query)
        return found + await self.wrong(route, who)

    async def ask(self, route: str, who: str, body: Any, query: str = "") -> httpx.Response:
        method, pattern = route.split(" ")
        path = pattern.format_map(self.stage.ids)
        asked = "&".join(filter(None, (QUERIES.get(route, ""), query)))
        headers = self.stage.shown[who][0]
        answer = await self.stage.http.request(
            method, f"{path}?{asked}", headers=dict(headers), json=body
        )
        self.stage.http.cookies.clear()
        assert answer.status_code < 500, f"{route} as {who} with {body}: {answer.text}"
        return answer


async def tried(plane: Plane) -> Try:
    stage = await Stage(await plane.through_gateway(), LOCAL_ADMIN, GATEWAY, JOIN).build()
    async with plane.db.read() as session:
        users = (await session.exec(sqlmodel.select(tables.User))).all()
    ids = {user.username.split("-")[0]: user.id or 0 for user in users}
    stage.ids["user_id"] = ids["other"]
    mine = {"user": ids["belongs"], "other": ids["other"]}
    return Try(plane, stage, mine | {"worker": stage.ids["worker_id"], "worker2": 2})


def _nothing(_: Stage) -> Any:
    return {}


def writes(plane: Plane) -> dict[str, bool]:
    """Routes below /v2 with which something is written -> whether they take a body."""
    return {
        f"{method.upper()} {path}": "requestBody" in said
        for path, methods in plane.app.openapi()["paths"].items()
        for method, said in methods.items()
        if method in {"post", "put", "patch"} and path.startswith("/v2/")
    }


def bodies(valid: dict[str, Any], more: dict[str, Any]) -> Iterator[Any]:
    """A valid body with more in it: at its top, and in each object of a list of its."""
    yield valid | more
    for name, value in valid.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            yield valid | {name: [value[0] | more, *value[1:]]}


@pytest.mark.parametrize("who", ["user", "other", "admin", "worker", "worker2", "join", "gateway"])
async def test_no_field_of_any_body_changes_what_it_may_not(plane: Plane, who: str) -> None:
    one, all_names = await tried(plane), names()
    await one.look()
    wrong = []
    for route, takes_body in writes(plane).items():
        if route in TEXTS:
            continue
        assert route in VALID or not takes_body, (
            f"{route} needs a valid body in VALID, or in BODIES"
        )
        make = VALID.get(route, _nothing)
        answer = await one.ask(route, who, make(one.stage) | all_names)
        if answer.status_code in {401, 403}:  # nobody looked at the body
            found = await one.wrong(route, who)
        else:
            found = await one.all_of(route, who, make, all_names if takes_body else {})
        wrong += [f"{route} as {who}: {each}" for each in found]
    assert not wrong, "\n" + "\n".join(wrong)
