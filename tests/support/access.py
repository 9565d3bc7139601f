"""Who may call which route: the table `access.txt`, and the calls that show whether it holds.

A route that is new gets a line in `access.txt`, and what it is called with in `BODIES`, `QUERIES`
or `DOOMED` below if it needs any of these to succeed.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any, Final, NamedTuple

import httpx

from gpustack.schemas import wire
from tests.support.ports import free_ports
from tests.support.wait import eventually

TABLE: Final = Path(__file__).with_suffix(".txt")
#: What those who do not own a thing must never be shown: it is in the names of all that has owners.
MARK: Final = "belongs-to-one"
#: Whom nothing of that belongs to, and who sees no more than what belongs to them.
OTHERS: Final = {"nobody", "join", "other", "worker2"}
#: Whom a hole lets in: enough for a quick look.
FEW: Final = {"nobody", "inference", "other", "admin", "worker2", "agent", "instance"}
PASSWORD: Final = "Of-a-test-1"
ORIGIN: Final = "http://evil.example"

Route = tuple[str, str]  # method, pattern


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        answers: principal -> status.
    """

    route: Route
    answers: Mapping[str, int]


def rows(place: str) -> list[Row]:
    """The lines of one place."""
    found: list[Row] = []
    columns: list[str] = []
    here = False
    for line in TABLE.read_text().splitlines():
        words = line.partition("#")[0].split()
        if words and words[0].startswith("["):
            here, columns = words[0] == f"[{place}]", words[1:]
        elif words and here:
            method, *pattern = words[: -len(columns)]
            said = words[-len(columns) :]
            assert pattern, (
                f"{TABLE.name}: {line}: want a method, a path and {len(columns)} answers"
            )
            answers = {name: int(one) for name, one in zip(columns, said, strict=True)}
            found.append(Row((method, " ".join(pattern)), answers))
    assert found, f"{TABLE.name} has no [{place}]"
    return found


def compare(place: str, routes: Iterable[Route]) -> list[Row]:
    """The lines of `place`, which has exactly these routes.

    Fails with a sentence that says which lines are lacking or left over.
    """
    known = rows(place)
    listed = [row.route for row in known]
    assert len(listed) == len({*listed}), f"{TABLE.name}: a route stands twice in [{place}]"
    there = {*routes}
    lacking = sorted(" ".join(one) for one in there - {*listed})
    assert not lacking, (
        f"{TABLE.name} lacks {', '.join(lacking)} in [{place}]: add a line that says who is let in"
    )
    over = sorted(" ".join(one) for one in {*listed} - there)
    assert not over, f"{TABLE.name} has a line in [{place}] for what is no route: {', '.join(over)}"
    return known


# --- credentials -----------------------------------------------------------------------------

#: Every place in a request that a credential is read from.
CARRIERS: Final[Mapping[str, Callable[[str], dict[str, str]]]] = {
    "authorization": lambda secret: {"Authorization": f"Bearer {secret}"},
    "x-api-key": lambda secret: {"x-api-key": secret},
    "api-key": lambda secret: {"api-key": secret},
    "cookie": lambda secret: {"Cookie": f"{wire.SESSION_COOKIE}={secret}"},
}

Headers = Mapping[str, str]


def carried(secrets: Iterable[str], without: str = "") -> list[Headers]:
    """Each carrier with one of the secrets, and each secret with one of the carriers."""
    carriers = [carry for name, carry in CARRIERS.items() if name != without]
    all_of = list(secrets)
    count = max(len(carriers), len(all_of))
    pairs = zip(itertools.cycle(carriers), itertools.cycle(all_of), strict=False)
    return [carry(secret) for carry, secret in itertools.islice(pairs, count)]


# --- what routes are called with -------------------------------------------------------------


@dataclass
class Stage:
    """Principals of every kind and one of everything, made through the API alone.

    Args:
        http: shows no credential of its own.
        admin, gateway, join: secrets that the cluster begins with.
        own: principals that only one port knows -> their secret; elsewhere they are strangers.

    Attributes:
        shown: principal -> every way in which it shows who it is.
        ids: placeholder of a path -> what stands there.
    """

    http: httpx.AsyncClient
    admin: str
    gateway: str
    join: str
    own: Mapping[str, str] = field(default_factory=dict)
    shown: dict[str, list[Headers]] = field(default_factory=dict)
    ids: dict[str, Any] = field(default_factory=dict)
    _sessions: dict[str, str] = field(default_factory=dict)
    _keys: dict[str, list[str]] = field(default_factory=dict)
    _workers: dict[str, dict[str, Any]] = field(default_factory=dict)
    _number: Iterator[int] = field(default_factory=itertools.count)
    _tag: str = field(default_factory=lambda: token_hex(3))  # stages on one node are apart
    _port: int = field(default_factory=lambda: free_ports(1))  # nobody listens there

    async def build(self) -> "Stage":
        users = {}
        for name in ("user", "other", "chief", "fresh", "off"):
            users[name] = await self._user(name, name in {"chief", "fresh"}, name == "fresh")
            await self.log_in(name)
        self._keys["user"] = [await self._key("user", MARK)]
        self.ids["key_id"] = self._last
        for name in ("other", "chief", "off"):
            self._keys[name] = [await self._key(name, "k")]
        ended = await self._key("user", "ended", expires_in=1)
        for scope in ("inference", "management", "metrics"):
            self._keys[scope] = [await self._key("chief", scope, scope=[scope])]
        await self._switch_off(users["off"])
        for name in ("worker", "worker2"):
            self._workers[name] = await self._worker(name)
        self.ids["worker_id"] = self._workers["worker"]["worker_id"]
        await self._objects(users["user"])
        token = await self._make("/v2/join-tokens", {"reusable": True})
        self._strangers = [
            "made-up", *self._keys.pop("off"), ended, self._workers["worker"]["agent_secret"]
        ]  # fmt: skip
        self._joining = [self.join, token["value"]]
        self._show()

        async def is_over() -> bool:
            answer = await self.http.get("/v2/users/me", headers=CARRIERS["api-key"](ended))
            return answer.status_code == 401

        await eventually(is_over, "the key with an end has ended", within_s=30)
        return self

    def _show(self) -> None:
        """Bring `shown` to what is true now."""
        cookie = CARRIERS["cookie"]
        self.shown = {
            # A token to join with is no cookie.
            "nobody": [{}, *carried(self._strangers), cookie(self._joining[0])],
            "join": carried(self._joining, without="cookie"),
            "fresh": carried([self._sessions["fresh"]]),
            "foreign": [cookie(self._sessions["chief"]) | {"Origin": ORIGIN}],
            "worker": carried([self._workers["worker"]["credential"]]),
            "worker2": carried([self._workers["worker2"]["credential"]]),
            "gateway": carried([self.gateway]),
        }
        for name, secret in self.own.items():
            self.shown[name] = [CARRIERS["authorization"](secret)]
            self.shown["nobody"] += carried([secret], without="authorization")
        for name, who in (("user", "user"), ("other", "other"), ("admin", "chief")):
            session = self._sessions[who]
            self.shown[name] = [*carried([session, *self._keys[who]]), cookie(session)]
        for scope, keys in self._keys.items():
            if scope in {"inference", "management", "metrics"}:
                self.shown[scope] = carried(keys)

    async def ask(self, method: str, path: str, headers: Headers, body: Any = None) -> Any:
        answer = await self.http.request(method, path, headers=dict(headers), json=body)
        self.http.cookies.clear()
        return answer

    async def _make(self, path: str, body: Any, secret: str = "", method: str = "POST") -> Any:
        headers = CARRIERS["authorization"](secret or self.admin)
        answer = await self.ask(method, path, headers, body)
        assert answer.is_success, f"{path}: {answer.status_code} {answer.text}"
        made = answer.json() if answer.content else None
        self._last = made.get("id") if isinstance(made, dict) else None
        return made

    async def _user(self, name: str, is_admin: bool, must_change: bool = False) -> int:
        facts = {"is_admin": is_admin, "require_password_change": must_change}
        body = {"username": self._username(name), "password": PASSWORD} | facts
        return int((await self._make("/v2/users", body))["id"])

    def _username(self, name: str) -> str:
        return f"{MARK if name == 'user' else name}-{self._tag}"

    async def log_in(self, name: str) -> None:
        form = {"username": self._username(name), "password": PASSWORD}
        answer = await self.http.post("/auth/login", json=form)
        self.http.cookies.clear()
        assert answer.is_success, answer.text
        cookie = answer.headers["set-cookie"].partition(";")[0]
        self._sessions[name] = cookie.removeprefix(f"{wire.SESSION_COOKIE}=")

    async def log_in_again(self, who: str) -> None:
        """Give a principal whose session has ended, if it has one, another."""
        user = {"admin": "chief"}.get(who, who)
        if user in self._sessions:
            await self.log_in(user)
            self._show()

    async def _key(self, who: str, name: str, **more: Any) -> str:
        made = await self._make("/v2/api-keys", {"name": name} | more, self._sessions[who])
        return str(made["value"])

    async def _switch_off(self, user_id: int) -> None:
        off = {"username": self._username("off"), "is_admin": False, "is_active": False}
        await self._make(f"/v2/users/{user_id}", off, method="PUT")

    async def _worker(self, name: str) -> dict[str, Any]:
        return dict(await self._make("/v2/workers/register", self.machine(name), self.join))

    def machine(self, name: str) -> dict[str, Any]:
        """What an agent says of its machine."""
        called = f"{name}-{self._tag}"
        place = {"ip": "127.0.0.1", "port": self._port, "labels": {"stage": called}}
        return {"name": called} | self.run(name) | place

    def run(self, name: str) -> dict[str, str]:
        """How an agent says which life of which machine it is."""
        return {"machine_id": f"{name}-{self._tag}", "boot_id": "boot", "run_id": "run"}

    @property
    def status(self) -> dict[str, Any]:
        """What an agent says of what the machine has."""
        gpu = {"index": 0, "vendor": "v", "type": "cuda", "memory_total_bytes": 2**30}
        facts = {"os": "linux", "arch": "x86_64", "cpu_count": 2, "memory_total_bytes": 2**34}
        return facts | {"gpu_devices": [gpu]}

    @property
    def versions(self) -> dict[str, Any]:
        """The model that was changed, so that there is something to go back to."""
        return self.model() | {"name": f"versions-{self._tag}"}

    def model(self, **more: Any) -> dict[str, Any]:
        spec = {"name": self.new("m"), "source": "local_path", "local_path": "/m.gguf"}
        return spec | {"replicas": 0} | more

    def new(self, what: str) -> str:
        return f"{what}-{self._tag}-{next(self._number)}"

    async def _objects(self, user_id: int) -> None:
        worker = self._workers["worker"]
        path = f"/v2/workers/{worker['worker_id']}"
        await self._make(f"{path}/status", self.status, worker["credential"], "PUT")
        self.ids |= {"user_id": user_id, "token_id": 1}
        self.ids |= {
            "device_id": f"worker-{self._tag}:cuda:0",
            "kind": "models",
            "name": "swagger-ui.css",
        }
        of = {"worker_selector": {"stage": f"worker-{self._tag}"}, "env": {"OF": MARK}}
        ran = await self._make("/v2/models", self.model(replicas=1, **of))
        await self._make("/v2/models", self.versions)
        self.ids["model_id"] = self.ids["object_id"] = self._last
        changed = self.versions | {"env": {"A": "1"}}
        await self._make(f"/v2/models/{self._last}", changed, method="PUT")
        file = {"source": "huggingface", "huggingface_repo_id": f"org/{MARK}"}
        await self._make("/v2/model-files", file | {"worker_id": worker["worker_id"]})
        self.ids["file_id"] = self._last
        await self._make("/v2/groups", {"name": self.new("g")})
        self.ids["group_id"] = self._last
        used = {"model_id": 1, "model": "m", "operation": "rerank", "started_at": 1.7e9}
        record = used | {"request_id": "r", "user_id": user_id}
        batch = {"spool": "0" * 32, "sequence": 1, "records": [record]}
        await self._make("/v2/usage", batch, self.gateway)

        async def placed() -> Any:
            found = await self._make(f"/v2/models/{ran['id']}/instances", None, method="GET")
            return next((one["id"] for one in found["items"] if one["worker_id"]), None)

        self.ids["instance_id"] = await eventually(placed, "the instance is placed", within_s=30)

    async def doomed(self, kind: str) -> Any:
        """The id of a new object, for a route that ends it."""
        new = self.new("doomed")
        match kind:
            case "user_id":
                user_id = await self._user(new, is_admin=False)
                members = f"/v2/groups/{self.ids['group_id']}/members"
                await self._make(members, {"user_ids": [user_id]})
                return user_id
            case "group_id":
                await self._make("/v2/groups", {"name": new})
            case "key_id":
                await self._key("user", f"{MARK}-{new}")
            case "model_id":
                await self._make("/v2/models", self.model())
            case "worker_id":
                return (await self._worker(new))["worker_id"]
            case "file_id":
                file = {"source": "huggingface", "huggingface_repo_id": f"org/{new}"}
                of = {"worker_id": self.ids["worker_id"]}
                await self._make("/v2/model-files", file | of)
            case "token_id":
                await self._make("/v2/join-tokens", {})
            case "instance_id":
                return await self._pending()
        return self._last

    async def _pending(self) -> Any:
        """An instance that no worker may take."""
        of = {"worker_selector": {"stage": "none"}}
        await self._make("/v2/models", self.model(replicas=1, **of))
        path = f"/v2/models/{self._last}/instances"

        async def made() -> Any:
            found = await self._make(path, None, method="GET")
            return next((one["id"] for one in found["items"]), None)

        return await eventually(made, "the model has an instance", within_s=30)


def _username(name: str) -> str:
    return MARK if name == "user" else name


#: What the model of that name is asked.
CHAT: Final = {"model": "chat", "messages": [{"role": "user", "content": "?"}], "max_tokens": 1}

_FILE: Final = {"source": "huggingface"}

#: What a route is called with so that whoever is let in succeeds. Without: nothing.
BODIES: Final[Mapping[str, Callable[[Stage], Any]]] = {
    "POST /auth/login": lambda s: {},  # 400: every password that is compared costs 50 ms
    "POST /auth/update-password": lambda s: {},  # 422, likewise
    "POST /v2/models": lambda s: s.model(),
    "PUT /v2/models/{model_id}": lambda s: s.versions | {"env": {"A": s.new("v")}},
    "PATCH /v2/models/{model_id}": lambda s: {"description": s.new("d")},
    "POST /v2/models/{model_id}/rollback": lambda s: {},
    "PUT /v2/model-instances/{instance_id}/status": lambda s: {"state": "scheduled"},
    "PUT /v2/workers/{worker_id}": lambda s: {"labels": {}},
    "POST /v2/workers/{worker_id}/cordon": lambda s: {"reason": s.new("r")},
    "POST /v2/workers/{worker_id}/drain": lambda s: {"reason": s.new("r")},
    "POST /v2/workers/register": lambda s: {},  # 422: else there would be one more each time
    "PUT /v2/workers/{worker_id}/registration": lambda s: s.machine("worker"),
    "PUT /v2/workers/{worker_id}/heartbeat": lambda s: s.run("worker"),
    "PUT /v2/workers/{worker_id}/status": lambda s: s.status,
    "PUT /v2/workers/{worker_id}/log-level": lambda s: "info",  # 503: no agent listens
    "POST /v2/api-keys": lambda s: {"name": s.new("k")},
    "PUT /v2/api-keys/{key_id}": lambda s: {"name": MARK},
    "POST /v2/users": lambda s: {},  # 422, as for logins
    "PUT /v2/users/me": lambda s: {},
    "PUT /v2/users/{user_id}": lambda s: {"username": s.new("u"), "is_admin": False},
    "PUT /v2/users/{user_id}/password": lambda s: {"password": "easy"},  # 422, or 403 for limits
    "PUT /v2/models/{model_id}/access": lambda s: {},
    "POST /v2/groups": lambda s: {"name": s.new("g")},
    "PUT /v2/groups/{group_id}": lambda s: {"name": s.new("g")},
    "POST /v2/groups/{group_id}/members": lambda s: {"user_ids": []},
    "POST /v2/usage": lambda s: {"spool": "1" * 32, "sequence": 1, "records": []},
    "PUT /debug/log_level": lambda s: "no level",  # 400: this process has one for all tests
    "POST /v2/apply": lambda s: {"models": [], "dry_run": True},
    "POST /v2/model-files": lambda s: (
        _FILE | {"huggingface_repo_id": f"org/{s.new('f')}", "worker_id": s.ids["worker_id"]}
    ),
    "POST /v2/workers/{worker_id}/model-files": lambda s: (
        _FILE | {"huggingface_repo_id": f"org/{s.new('f')}", "state": "ready"}
    ),
    "PUT /v2/model-files/{file_id}/status": lambda s: {"state": "ready"},
    "POST /v2/join-tokens": lambda s: {},
    # below: of gateway and relay
    "POST /v1/chat/completions": lambda s: CHAT,
    "POST /v1-openai/chat/completions": lambda s: CHAT,
    **{
        f"POST {path}": lambda s: {}  # 400: no model is named
        for path in (
            "/v1/completions",
            "/v1/embeddings",
            "/v1/rerank",
            "/v1-openai/completions",
            "/v1-openai/embeddings",
            "/v1-openai/rerank",
            "/v2/rerank",
        )
    },
    "* /{any} with x-gpustack-instance": lambda s: CHAT,
}
QUERIES: Final[Mapping[str, str]] = {
    "GET /v2/watch": "kinds=dogs",  # 400: whoever is let in with a real kind never sees an end
    "DELETE /v2/models": "ids={model_id}",
}
#: Routes that end what they are called on -> its placeholder; whoever succeeds leaves a new one.
DOOMED: Final[Mapping[str, str]] = {
    "DELETE /v2/models": "model_id",
    "DELETE /v2/models/{model_id}": "model_id",
    "DELETE /v2/model-instances/{instance_id}": "instance_id",
    "DELETE /v2/workers/{worker_id}": "worker_id",
    "DELETE /v2/api-keys/{key_id}": "key_id",
    "DELETE /v2/users/{user_id}": "user_id",
    "PUT /v2/users/{user_id}": "user_id",
    "GET /v2/users/{user_id}": "user_id",
    "PUT /v2/users/{user_id}/password": "user_id",
    "DELETE /v2/groups/{group_id}": "group_id",
    "DELETE /v2/groups/{group_id}/members/{user_id}": "user_id",
    "DELETE /v2/model-files/{file_id}": "file_id",
    "DELETE /v2/join-tokens/{token_id}": "token_id",
}


async def differences(stage: Stage, known: Iterable[Row], *, thorough: bool) -> list[str]:
    """Each call whose answer is not the table's, as a sentence; also each that shows too much.

    Args:
        thorough: every principal with every carrier; else a few with one carrier each, in turn.
    """
    wrong: list[str] = []
    turn = itertools.count()
    for row in known:
        name = " ".join(row.route)
        ids, doomed = dict(stage.ids), DOOMED.get(name)
        if doomed is not None and any(status < 300 for status in row.answers.values()):
            ids[doomed] = await stage.doomed(doomed)
        for who, expected in row.answers.items():
            if not (thorough or who in FEW):
                continue
            count = len(stage.shown[who])
            for number in range(count) if thorough else [next(turn) % count]:
                headers = stage.shown[who][number]
                answer = await _call(stage, row.route, ids, headers)
                how = f"{who} ({', '.join(headers) or 'nothing shown'})"
                if answer.status_code != expected:
                    said = f"{answer.status_code} {answer.text[:200]}"
                    wrong.append(f"{name} as {how}: {TABLE.name} says {expected}, answered {said}")
                if who in OTHERS and MARK in answer.text:
                    wrong.append(f"{name} as {how} shows what is not theirs: {answer.text[:200]}")
                if doomed is not None and answer.is_success:
                    ids[doomed] = await stage.doomed(doomed)
                if name == "POST /auth/logout" and answer.is_success:
                    await stage.log_in_again(who)
    return wrong


async def _call(
    stage: Stage, route: Route, ids: Mapping[str, Any], headers: Headers
) -> httpx.Response:
    method, pattern = route
    name = f"{method} {pattern}"
    lacking = {*re.findall(r"\{(\w+)", pattern)} - {*ids}
    assert not lacking, f"{name}: say in Stage._objects what stands for {', '.join(lacking)}"
    path = pattern.replace(":path}", "}").partition(" ")[0].format_map(ids)
    if method == "*":  # any: what matters to the relay is the instance that is named
        method, headers = "POST", {**headers, wire.INSTANCE_HEADER: str(ids["instance_id"])}
    if name in QUERIES:
        path += "?" + QUERIES[name].format_map(ids)
    body = BODIES[name](stage) if name in BODIES else None
    content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    kind = {"Content-Type": "application/json"}
    answer = await stage.http.request(
        method, path, headers=kind | dict(headers), content=content if name in BODIES else b""
    )
    stage.http.cookies.clear()
    return answer
