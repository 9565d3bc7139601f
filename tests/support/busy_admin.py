"""An administrator who never rests, with machines of their own: a seeded mix of all writes."""

import asyncio
import hashlib
import itertools
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from tests.support.acknowledged import Change, Count, Entry, Known
from tests.support.server_role import ServerRole

Body = dict[str, Any]
#: So many of a kind are there at a time, at most.
MOST = 6
#: What the worker says next of an instance in each state.
NEXT = {"scheduled": "starting", "starting": "running", "running": "running"}


class CutError(Exception):
    """The server went while a request was open: nobody knows what became of it."""


class BusyAdmin:
    """One request after the other, each of which changes something that can be seen.

    Names of its objects begin with its own and are never used again.

    Attributes:
        ids: of its objects, by kind and name.
        keys: values of its API keys, by name.
    """

    def __init__(
        self, name: str, server: ServerRole, http: httpx.AsyncClient, count: Count, seed: int
    ) -> None:
        self.known = Known(f"{name}-")
        self.ids: dict[tuple[str, str], int] = {}
        self.keys: dict[str, str] = {}
        self._name, self._server, self._http, self._count = name, server, http, count
        self._rng = random.Random(f"{seed} {name}")
        self._number = itertools.count(1)
        self._credentials: dict[str, str] = {}
        self._on: dict[str, str] = {}  # instance -> worker
        self._batch: Body | None = None
        self._used = Counter[str]()
        self._acts: list[Callable[[], Awaitable[None]]] = [
            self._create_model, self._put_model, self._patch_model, self._patch_model,
            self._delete_model, self._delete_models, self._apply,
            self._create_key, self._update_key, self._delete_key,
            self._create_user, self._update_user, self._delete_user,
            self._register, self._announce, self._label, self._report_worker, self._delete_worker,
            self._report_instance, self._report_instance, self._report_instance,
            self._use, self._count_up,
        ]  # fmt: skip

    async def run(self, enough: asyncio.Event) -> None:
        """Change things until it is enough, or a request is cut."""
        while not enough.is_set():
            try:
                await self._rng.choice(self._acts)()
            except CutError:
                return

    # --- requests ----------------------------------------------------------------------------

    async def _ask(self, method: str, path: str, body: Any = None, token: str = "") -> Any:
        shown = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            answer = await self._http.request(method, path, json=body, headers=shown)
        except httpx.TransportError:
            raise CutError from None
        assert answer.is_success, f"{method} {path} {body}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    async def _change(
        self, change: Change, method: str, path: str, body: Any = None, token: str = ""
    ) -> Any:
        self.known.cut = change
        answer = await self._ask(method, path, body, token)
        self.known.cut = None
        self.known.acknowledge(change)
        return answer

    def _new(self, what: str) -> str:
        return f"{self._name}-{what}{next(self._number)}"

    def _one(self, kind: str) -> str | None:
        names = self.known.named(kind)
        return self._rng.choice(names) if names else None

    def _is_full(self, kind: str) -> bool:
        return len(self.known.named(kind)) >= MOST

    def _facts(self, kind: str, name: str) -> Body:
        return dict(self.known.there[kind, name] or {})

    # --- models ------------------------------------------------------------------------------

    def _spec(self, name: str) -> Body:
        return {
            "name": name,
            "description": self._new("says"),
            "replicas": self._rng.randrange(3),
            "source": "local_path",
            "local_path": f"/models/{self._rng.randrange(3)}.gguf",
            "worker_selector": {"of": self._name},
        }

    def _model(self, action: str, spec: Body, generation: int) -> Change:
        facts = {key: spec[key] for key in ("description", "replicas", "local_path")}
        entry = Entry(action, "models", spec["name"], spec["description"])
        after = {("models", spec["name"]): facts | {"generation": generation}}
        return Change(after, (entry,))

    def _updated(self, name: str) -> tuple[Body, Change]:
        """A whole new spec of a model, and what it changes."""
        spec = self._spec(name)
        return spec, self._model("update", spec, self._facts("models", name)["generation"] + 1)

    def _deleted(self, kind: str, *names: str) -> Change:
        entries = tuple(Entry("delete", kind, name) for name in names)
        return Change({(kind, name): None for name in names}, entries)

    async def _create_model(self) -> None:
        if not self._is_full("models"):
            spec = self._spec(self._new("m"))
            change = self._model("create", spec, 1)
            made = await self._change(change, "POST", "/v2/models", spec)
            self.ids["models", spec["name"]] = made["id"]

    async def _put_model(self) -> None:
        if (name := self._one("models")) is not None:
            spec, change = self._updated(name)
            read = {"generation": self._facts("models", name)["generation"]}
            path = f"/v2/models/{self.ids['models', name]}"
            await self._change(change, "PUT", path, spec | read)

    async def _patch_model(self) -> None:
        if (name := self._one("models")) is not None:
            spec, change = self._updated(name)
            path = f"/v2/models/{self.ids['models', name]}"
            await self._change(change, "PATCH", path, spec)

    async def _delete_model(self) -> None:
        if (name := self._one("models")) is not None:
            path = f"/v2/models/{self.ids['models', name]}"
            await self._change(self._deleted("models", name), "DELETE", path)

    async def _delete_models(self) -> None:
        names = self.known.named("models")
        if len(names) > MOST // 2:
            gone = self._rng.sample(names, 3)
            ids = ",".join(str(self.ids["models", name]) for name in gone)
            await self._change(self._deleted("models", *gone), "DELETE", f"/v2/models?ids={ids}")

    async def _apply(self) -> None:
        """Models that are new and one that is there, all or none."""
        if (name := self._one("models")) is None or self._is_full("models"):
            return
        spec, updated = self._updated(name)
        specs = [self._spec(self._new("m")) for _ in range(2)]
        made = [self._model("create", one, 1) for one in specs]
        change = Change(
            {key: facts for one in (updated, *made) for key, facts in one.after.items()},
            tuple(entry for one in (updated, *made) for entry in one.audited),
        )
        await self._change(change, "POST", "/v2/apply", {"models": [spec, *specs]})
        for one in specs:
            found = await self._ask("GET", f"/v2/models?name={one['name']}")
            self.ids["models", one["name"]] = found["items"][0]["id"]

    # --- keys and users ----------------------------------------------------------------------

    async def _create_key(self) -> None:
        if not self._is_full("api-keys"):
            await self._key("create", self._new("k"), "POST", "/v2/api-keys")

    async def _update_key(self) -> None:
        if (name := self._one("api-keys")) is not None:
            await self._key("update", name, "PUT", f"/v2/api-keys/{self.ids['api-keys', name]}")

    async def _key(self, action: str, name: str, method: str, path: str) -> None:
        says = self._new("says")
        entry = Entry(action, "api-keys", name, says)
        change = Change({("api-keys", name): {"description": says}}, (entry,))
        body = {"name": name, "description": says}
        made = await self._change(change, method, path, body)
        self.ids["api-keys", name] = made["id"]
        if "value" in made:
            self.keys[name] = made["value"]

    async def _delete_key(self) -> None:
        if (name := self._one("api-keys")) is not None:
            path = f"/v2/api-keys/{self.ids['api-keys', name]}"
            await self._change(self._deleted("api-keys", name), "DELETE", path)

    async def _create_user(self) -> None:
        if not self._is_full("users"):
            await self._user("create", self._new("u"), "POST", "/v2/users")

    async def _update_user(self) -> None:
        if (name := self._one("users")) is not None:
            await self._user("update", name, "PUT", f"/v2/users/{self.ids['users', name]}")

    async def _user(self, action: str, name: str, method: str, path: str) -> None:
        says = self._new("says")
        change = Change(
            {("users", name): {"full_name": says}}, (Entry(action, "users", name, says),)
        )
        body = {"username": name, "full_name": says, "password": password(says), "is_admin": False}
        made = await self._change(change, method, path, body)
        self.ids["users", name] = made["id"]

    async def _delete_user(self) -> None:
        if (name := self._one("users")) is not None:
            path = f"/v2/users/{self.ids['users', name]}"
            await self._change(self._deleted("users", name), "DELETE", path)

    # --- workers and what is on them ---------------------------------------------------------

    def _registration(self, name: str) -> tuple[Body, Change]:
        ip = self._new("host")
        body = {
            "name": name, "machine_id": f"machine of {name}", "boot_id": "boot", "run_id": "run",
            "ip": ip, "port": 10150, "labels": {"of": self._name},
        }  # fmt: skip
        return body, Change({("workers", name): {"ip": ip}})

    async def _register(self) -> None:
        """A new machine; or one whose answer was cut, so that it does not know its credential."""
        unsure = [one for one in self.known.named("workers") if one not in self._credentials]
        if not unsure and self._is_full("workers"):
            return
        body, change = self._registration(unsure[0] if unsure else self._new("w"))
        token = self._server.secret("token")
        made = await self._change(change, "POST", "/v2/workers/register", body, token)
        self.ids["workers", body["name"]] = made["worker_id"]
        self._credentials[body["name"]] = made["credential"]

    def _worker(self) -> str | None:
        """One that knows its credential."""
        names = [one for one in self.known.named("workers") if one in self._credentials]
        return self._rng.choice(names) if names else None

    async def _announce(self) -> None:
        if (name := self._worker()) is not None:
            body, change = self._registration(name)
            path = f"/v2/workers/{self.ids['workers', name]}/registration"
            await self._change(change, "PUT", path, body, self._credentials[name])

    async def _report_worker(self) -> None:
        if (name := self._worker()) is not None:
            count = next(self._number)
            gib = 2**30
            body = {"os": "linux", "arch": "x86_64", "cpu_count": count, "memory_total_bytes": gib}
            path = f"/v2/workers/{self.ids['workers', name]}/status"
            change = Change({("workers", name): {"cpu_count": count}})
            await self._change(change, "PUT", path, body, self._credentials[name])

    async def _label(self) -> None:
        if (name := self._worker()) is not None:
            says = self._new("says")
            entry = Entry("update", "workers", name, says)
            change = Change({("workers", name): {"label": says}}, (entry,))
            path = f"/v2/workers/{self.ids['workers', name]}"
            await self._change(change, "PUT", path, {"labels": {"says": says}})

    async def _delete_worker(self) -> None:
        name = self._worker()
        if name is None or self._rng.random() < 0.5:  # they should get something to run
            return
        change = self._deleted("workers", name)
        gone = {("model-instances", one): None for one, on in self._on.items() if on == name}
        change = Change({**change.after, **gone}, change.audited)
        await self._change(change, "DELETE", f"/v2/workers/{self.ids['workers', name]}")

    async def _report_instance(self) -> None:
        if (name := self._worker()) is not None:
            items = await self._assigned(name)
            ending = [one for one in items if one["state"] == "stopping"]
            if items:
                await self._say(name, self._rng.choice(ending or items))

    async def _assigned(self, worker: str) -> list[Body]:
        answer = await self._ask("GET", "/v2/model-instances", token=self._credentials[worker])
        found: list[Body] = answer["items"]
        return found

    async def _say(self, worker: str, instance: Body) -> None:
        """What its worker says next of an instance."""
        key = ("model-instances", instance["name"])
        says, port = self._new("says"), self._rng.randrange(40000, 50000)
        body: Body = {"state": "gone"}
        change = Change({key: None})
        if instance["state"] != "stopping":
            state = NEXT[instance["state"]]
            body = {"state": state, "state_message": says, "port": port}
            change = Change({key: {"state_message": says, "port": port}})
            self._on[instance["name"]] = worker
        path = f"/v2/model-instances/{instance['id']}/status"
        await self._change(change, "PUT", path, body, self._credentials[worker])

    async def tend(self) -> None:
        """Have every worker do what is wanted of it."""
        for name in self.known.named("workers"):
            if name not in self._credentials:
                await self._register()
            for instance in await self._assigned(name):
                if instance["state"] != "running":
                    await self._say(name, instance)

    # --- usage, and what all count together --------------------------------------------------

    async def _use(self) -> None:
        """A batch of a gateway's records; one whose answer was cut is sent again, and adds nothing
        if it had come."""
        if self._batch is None:
            records = [self._record() for _ in range(self._rng.randrange(1, 5))]
            self._used += Counter(requests=len(records))
            self._used += Counter(tokens=sum(one["prompt_tokens"] for one in records))
            spool = hashlib.md5(self._name.encode(), usedforsecurity=False).hexdigest()
            self._batch = {"spool": spool, "sequence": next(self._number), "records": records}
        change = Change({("usage", f"{self._name}-used"): dict(self._used)})
        token = self._server.secret("gateway_credential")
        await self._change(change, "POST", "/v2/usage", self._batch, token)
        self._batch = None

    def _record(self) -> Body:
        return {
            "request_id": self._new("r"),
            "model_id": 10**9 + int(self._name[1:]),
            "model": f"{self._name}-used",
            "operation": "chat/completions",
            "prompt_tokens": self._rng.randrange(1, 100),
            "status": 200,
            "started_at": time.time(),
        }

    async def _count_up(self) -> None:
        """Compare and swap: what another has counted meanwhile is not lost."""
        path = f"/v2/models/{self._count.model_id}"
        read = await self._ask("GET", path)
        more = {
            "description": str(int(read["description"]) + 1),
            "generation": read["generation"],
        }
        self._count.open += 1
        try:
            answer = await self._http.patch(path, json=more)
        except httpx.TransportError:
            raise CutError from None
        self._count.open -= 1
        assert answer.status_code in {200, 409}, answer.text
        self._count.acknowledged += answer.status_code == 200

    # --- what holds after a restart ----------------------------------------------------------

    async def prove(self) -> None:
        """Keys that are there open the door, those that are gone do not; a password goes with the
        name that came with it."""
        for name in self._rng.sample(sorted(self.keys), min(3, len(self.keys))):
            shown = {"Authorization": f"Bearer {self.keys[name]}"}
            answer = await self._http.get("/v2/users/me", headers=shown)
            is_there = self.known.there["api-keys", name] is not None
            assert answer.status_code == (200 if is_there else 401), name
        if (user := self._one("users")) is not None:
            full_name = self._facts("users", user)["full_name"]
            body = {"username": user, "password": password(full_name)}
            answer = await self._http.post("/auth/login", json=body)
            assert answer.status_code == 204, f"{user} cannot log in: {answer.text}"
            self._http.cookies.clear()


def password(full_name: str) -> str:
    """A user's, that goes with the full name: both were changed by one request, or neither."""
    return f"Aa1!{full_name}"
