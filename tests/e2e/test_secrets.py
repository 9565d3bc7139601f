"""Secrets never appear: all that a whole run leaves behind is searched for each of them.

A node and a worker of its own live through what a cluster lives through, with logs at debug level:
logins, users, keys, tokens and their rotation, models with secrets in their environment, an engine
that runs and one that fails, mistakes that hold secrets, kills. Then logs, files, arguments of
processes, answers, events and the audit log are searched.
"""

import json
import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from gpustack.lib.platform import live_pids
from gpustack.schemas import wire
from tests.e2e.conftest import MakeNode
from tests.support.access import CARRIERS
from tests.support.node import Node
from tests.support.wait import soon

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BOOTSTRAP, CLUSTER, HUB = (
    "Boot-secret-81",
    "cluster-secret-82-0123456789",
    "hf_secret83aaaaaaaaaaaa",
)
#: Passwords, right and wrong, by what becomes of them.
GIVEN, CHANGED, EASY, WRONG, MISPLACED = (
    "Given-secret-84", "Changed-secret-85", "easysecret86", "Wrong-secret-87", "Name-secret-88",
)  # fmt: skip
#: In the environment of a model's engine: administrators read that back with the model.
ENV, BAD_ENV, PARAMETER = "env-secret-89", "env-secret-90", "parameter-secret-91"
MADE_UP_KEY = "gpustack_0123456789abcdef_secret920123456789"

TOLD = (
    BOOTSTRAP,
    HUB,
    GIVEN,
    CHANGED,
    EASY,
    WRONG,
    MISPLACED,
    ENV,
    BAD_ENV,
    PARAMETER,
    MADE_UP_KEY,
)


@dataclass
class Seen:
    """What was answered, and which secrets there are.

    Attributes:
        admin, nobody: clients of the node.
        answers: (what was asked for, headers and body), without those that may show a secret.
        secrets: value -> what it is.
    """

    admin: httpx.Client
    nobody: httpx.Client
    answers: list[tuple[str, str]] = field(default_factory=list)
    secrets: dict[str, str] = field(default_factory=dict)

    def ask(
        self, http: httpx.Client, method: str, path: str, *, shows: str = "", **more: Any
    ) -> httpx.Response:
        """The answer; one that `shows` a secret, once and for all, is not searched for it.

        Args:
            shows: the field of the body, or the name of the cookie, that has it; `env`: none, but
                what administrators read back of a model.
        """
        answer = http.request(method, path, **more)
        http.cookies.clear()
        said = f"{answer.headers}\n{answer.text}"
        if shows == wire.SESSION_COOKIE:
            secret = answer.headers["set-cookie"].partition(";")[0].partition("=")[2]
        else:
            secret = str(answer.json()[shows]) if shows and shows != "env" else ""
        if secret:
            self.secrets[secret] = f"{shows} of {method} {path}"
            said = said.replace(secret, "")
        if shows == "env":
            said = said.replace(ENV, "").replace(BAD_ENV, "").replace(PARAMETER, "")
        self.answers.append((f"{method} {path}", said))
        return answer


@contextmanager
def commands() -> Iterator[set[str]]:
    """The arguments of every process that lives meanwhile, but of this one."""
    seen: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.005):
            for pid in live_pids():
                if pid != os.getpid():
                    try:
                        seen.add(Path(f"/proc/{pid}/cmdline").read_text(errors="replace"))
                    except OSError:
                        continue

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def quiet(node: Node) -> Node:
    """Without the token among its arguments: whoever puts it there has chosen so."""
    if "--token" in node.arguments:
        at = node.arguments.index("--token")
        _, token = node.arguments[at : at + 2]
        node.arguments[at : at + 2] = []
        node.environment["GPUSTACK_TOKEN"] = token
    node.environment |= {
        "GPUSTACK_DEBUG": "true",
        "GPUSTACK_HUGGINGFACE_TOKEN": HUB,
        "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody is there: an error with an address in it
    }
    return node


def of_files(node: Node) -> dict[str, str]:
    """The secrets that the parts of a node know each other by."""
    found = {}
    for name in ("local_admin", "gateway_credential", "token", "initial_admin_password"):
        if (path := node.data_dir / name).exists():
            found[path.read_text().strip()] = name
    for path in [*node.data_dir.glob("engines/*.json")]:
        file = Path(json.loads(path.read_text())["secret_file"])
        if file.exists():
            found[file.read_text().strip()] = "an instance's secret"
    if (path := node.data_dir / "worker_credential").exists():
        worker = json.loads(path.read_text())
        found |= {worker["credential"]: "a worker's", worker["agent_secret"]: "an agent's"}
    return found


def people(seen: Seen, node: Node) -> None:
    """Logins, users, keys, right and wrong."""
    admin, nobody, ask = seen.admin, seen.nobody, seen.ask
    cluster = (node.data_dir / "token").read_text().strip()
    seen.secrets[cluster] = "the cluster's first token"
    user = {"username": "user", "password": GIVEN}
    ask(admin, "POST", "/v2/users", json=user)
    ask(admin, "POST", "/v2/users", json={"username": "made"}, shows="password")
    ask(admin, "PUT", "/v2/users/3/password", shows="password")
    for wrong in ({"password": EASY}, {"password": [GIVEN]}, {"is_admin": GIVEN}):
        answer = ask(admin, "POST", "/v2/users", json={"username": "wrong"} | wrong)
        assert answer.status_code == 422
    ask(admin, "POST", "/v2/users", content=f'{{"username": "x", "password": "{GIVEN}"')
    for form in (
        user | {"password": WRONG}, {"username": MISPLACED, "password": WRONG},
        {"username": "admin", "password": WRONG}, {"password": GIVEN}, [GIVEN], GIVEN,
    ):  # fmt: skip
        assert ask(nobody, "POST", "/auth/login", json=form).status_code in {400, 401}
    ask(nobody, "POST", "/auth/login", data={"username": "admin", "password": BOOTSTRAP},
        shows=wire.SESSION_COOKIE)  # fmt: skip
    login = ask(nobody, "POST", "/auth/login", json=user, shows=wire.SESSION_COOKIE)
    cookie = {"Cookie": login.headers["set-cookie"].partition(";")[0]}
    change = {"current_password": GIVEN, "new_password": EASY}
    ask(nobody, "POST", "/auth/update-password", json=change, headers=cookie)
    change["new_password"] = CHANGED
    assert ask(nobody, "POST", "/auth/update-password", json=change, headers=cookie).is_success
    key = ask(nobody, "POST", "/v2/api-keys", json={"name": "k"}, headers=cookie, shows="value")
    for carry in CARRIERS.values():
        ask(nobody, "GET", "/v2/users/me", headers=carry(key.json()["value"]))
        for path in ("/v2/users/me", "/v1/models", f"/v2/users/me?key={MADE_UP_KEY}"):
            ask(nobody, "GET", path, headers=carry(MADE_UP_KEY))
    ask(nobody, "GET", "/v2/api-keys", headers=cookie)
    ask(nobody, "POST", "/auth/logout", headers=cookie)
    ask(admin, "POST", "/v2/join-tokens", json={}, shows="value")
    ask(admin, "POST", "/v2/cluster-token/rotate", shows="value")
    old = CARRIERS["authorization"](cluster)
    assert ask(nobody, "POST", "/v2/workers/register", headers=old, json={}).status_code == 401


def model_lives(seen: Seen, models: Path) -> None:
    """One that runs, one that fails, one that cannot be had; and what is asked of them."""
    admin = seen.admin
    spec = {"source": "local_path"}
    chat = {
        "name": "chat", "local_path": str(models / "chat.gguf"), "env": {"A_KEY": ENV},
        "backend_parameters": ["--threads=1"],
    }  # fmt: skip
    broken = {"name": "broken", "local_path": str(models / "broken.gguf"), "env": {"B": BAD_ENV}}
    hub = {"name": "hub", "source": "huggingface", "huggingface_repo_id": "org/none"}
    hub["huggingface_filename"] = "none.gguf"
    odd = {"backend_parameters": [f"--hf-token={PARAMETER}"], "replicas": 0, "name": "odd"}
    for more in (chat, broken, hub, chat | odd):
        answer = seen.ask(admin, "POST", "/v2/models", json=spec | more, shows="env")
        assert answer.status_code == 201, answer.text
    for wrong in ({"A": [ENV]}, [ENV], ENV):
        seen.ask(admin, "POST", "/v2/models", json=spec | chat | {"name": "w", "env": wrong})

    def settled() -> bool:
        found = admin.get("/v2/model-instances").json()["items"]
        states = {one["name"].rpartition("-")[0]: one["state"] for one in found}
        return states.get("chat") == "running" and states.get("broken") == "error"

    soon(settled, "one model runs and one has failed", within_s=90)
    key = seen.ask(admin, "POST", "/v2/api-keys", json={"name": "mine"}, shows="value")
    shown = CARRIERS["authorization"](key.json()["value"])
    body = {"model": "chat", "messages": [{"role": "user", "content": "?"}], "max_tokens": 2}
    for change in ({}, {"stream": True}, {"model": "none"}, {"messages": 5}):
        seen.ask(seen.nobody, "POST", "/v1/chat/completions", json=body | change, headers=shown)
    found = admin.get("/v2/model-instances").json()["items"]
    for one in found:
        seen.ask(admin, "GET", f"/v2/model-instances/{one['id']}/logs")
        seen.ask(admin, "GET", f"/v2/model-instances/{one['id']}", shows="env")


def everything_read(seen: Seen, node: Node, worker: Node) -> None:
    """All that can be looked at."""
    admin = seen.admin
    for path in admin.get("/openapi.json").json()["paths"]:
        if "{" not in path and path not in {"/v2/watch", "/auth/logout"}:
            of_models = path.startswith(("/v2/models", "/v2/model-instances"))
            seen.ask(admin, "GET", path, shows="env" if of_models else "")
    for kind, id in (("models", 1), ("models", 2), ("workers", 1)):
        seen.ask(admin, "GET", f"/v2/{kind}/{id}/events")
    seen.ask(admin, "GET", "/v2/models/1/versions", shows="env")
    for port in (node.metrics_port, worker.worker_metrics_port):
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False, timeout=60)
        seen.answers.append(("metrics", metrics.text))


def test_no_secret_appears_anywhere_in_a_whole_run(make_node: MakeNode, models: Path) -> None:
    with commands() as lines:
        node = quiet(make_node("--disable-worker", name="server"))
        node.environment["GPUSTACK_BOOTSTRAP_PASSWORD"] = BOOTSTRAP
        node.start()
        worker = quiet(make_node(name="worker", server=node)).start()
        with node.http() as admin, node.http(None) as nobody:
            seen = Seen(admin, nobody)
            seen.secrets |= dict.fromkeys(TOLD, "told")
            people(seen, node)
            model_lives(seen, models)
            for one in (node, worker):
                seen.secrets |= of_files(one)
            os.kill(worker.pids("agent")[0], signal.SIGKILL)
            os.kill(node.pids("server")[0], signal.SIGKILL)
            soon(lambda: admin.get("/v2/workers").is_success, "the server is back", within_s=60)
            everything_read(seen, node, worker)
        worker.stop()
        node.stop()
    assert all(len(secret) >= 10 for secret in seen.secrets)
    assert len(seen.secrets) > 20
    wrong = [
        *(f"{who}: answered to {what}" for what, said in seen.answers for who in _in(seen, said)),
        *(f"{who}: arguments {line!r}" for line in lines for who in _in(seen, line)),
        *_in_files(seen, node),
        *_in_files(seen, worker),
    ]
    assert not wrong, "\n".join(wrong)


def _in(seen: Seen, text: str) -> list[str]:
    return [f"{secret} ({what})" for secret, what in seen.secrets.items() if secret in text]


def _in_files(seen: Seen, node: Node) -> Iterator[str]:
    """Secrets in what a node printed, and in files that others may read or that are logs."""
    files = [path for path in node.data_dir.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in [node.log, *files]:
        is_private = stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
        is_log = path == node.log or node.log_dir in path.parents
        if is_log or not is_private:
            for who in _in(seen, path.read_bytes().decode("latin-1")):
                yield f"{who}: {path}, mode {path.stat().st_mode:o}"
