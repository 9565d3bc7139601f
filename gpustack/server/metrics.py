"""What the server's metrics port says: the cluster by state, requests and tokens by model."""

import socket
from collections import Counter
from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from sqlmodel import col, select

from gpustack.errors import Forbidden, Unauthorized
from gpustack.forward import metrics
from gpustack.forward.listener import Exchange
from gpustack.forward.metrics import Metric
from gpustack.lib import carriers
from gpustack.schemas import wire
from gpustack.schemas.credentials import Scope
from gpustack.schemas.instances import InstanceState, shown_state
from gpustack.schemas.usage import UsageRecord
from gpustack.schemas.workers import WorkerState
from gpustack.server.auth.known import Known
from gpustack.server.auth.principals import Principal, note_use, resolve
from gpustack.server.db.database import Database, ReadSession
from gpustack.server.db.tables import Instance, Model, Worker
from gpustack.server.feed import Feed
from gpustack.server.heartbeats import Heartbeats
from gpustack.server.views import GATEWAY

_READERS = {Scope.ALL, Scope.METRICS}
_MODEL, _STATE = ("model",), ("state",)


class Served:
    """Requests and tokens that gateways told this server of, since it began."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, ...]] = Counter()
        self._prompt: Counter[tuple[str, ...]] = Counter()
        self._completion: Counter[tuple[str, ...]] = Counter()

    def add(self, records: Iterable[UsageRecord]) -> None:
        for record in records:
            self._requests[record.model, "cut" if record.cut else str(record.status)] += 1
            self._prompt[record.model,] += record.prompt_tokens
            self._completion[record.model,] += record.completion_tokens

    def metrics(self) -> list[Metric]:
        return [
            Metric(
                "gpustack_requests_total",
                "Requests to models by the status of their answers; cut: the client left.",
                ("model", "status"),
                self._requests,
                counts=True,
            ),
            Metric(
                "gpustack_prompt_tokens_total", "Tokens asked with.", _MODEL, self._prompt, True
            ),
            Metric(
                "gpustack_completion_tokens_total",
                "Tokens answered with.",
                _MODEL,
                self._completion,
                True,
            ),
        ]


async def serve(sock: socket.socket, app: FastAPI, *, force_auth: bool) -> None:
    """Answer at `sock` until cancelled."""
    db: Database = app.state.db

    async def admit(exchange: Exchange) -> None:
        note_use(await _admit(db, app.state.known, exchange), app.state.last_uses)

    async def gather() -> list[Metric]:
        served: Served = app.state.served
        return [
            *await _cluster(db, app.state.heartbeats),
            *_watches(app.state.feed, app.state.settings.gateways),
            *served.metrics(),
        ]

    await metrics.serve(sock, gather, admit, force_auth=force_auth)


async def _admit(db: Database, known: Known[Principal], exchange: Exchange) -> Principal:
    pairs = ((name.decode("latin-1"), value.decode("latin-1")) for name, value in exchange.headers)
    shown = carriers.shown(pairs, wire.SESSION_COOKIE)
    if shown is None:
        raise Unauthorized("Metrics need an API key from elsewhere than this machine.")
    found = await resolve(db, known, shown.secret)
    if found.scopes.isdisjoint(_READERS) or found.password_change_required:
        raise Forbidden("This credential may not read metrics; a key with scope metrics may.")
    if not found.is_admin:  # they name models that may not be this user's to see
        raise Forbidden("Metrics are of the whole cluster: an administrator's key may read them.")
    return found


def _watches(feed: Feed, gateways: int) -> list[Metric]:
    """Of all that watch; and of this node's gateways, which hear of a revoked key by their watch.

    Args:
        gateways: how many this node has.
    """
    connected = min(feed.watches_of(GATEWAY), gateways)
    states: dict[tuple[str, ...], float] = {
        ("connected",): connected,
        ("disconnected",): gateways - connected,
    }
    return [
        Metric("gpustack_watches", "Watch streams that are open here.", (), {(): feed.watches}),
        Metric(
            "gpustack_gateways",
            "This node's gateways by their watch: one that is disconnected goes on with what it "
            "knew, and hears of no key that is revoked.",
            _STATE,
            states,
        ),
    ]


async def _cluster(db: Database, heartbeats: Heartbeats) -> list[Metric]:
    async with db.read() as session:
        return [
            *await _models_and_instances(session),
            *await _workers(session, heartbeats),
        ]


async def _workers(session: ReadSession, heartbeats: Heartbeats) -> list[Metric]:
    known = select(Worker.id, Worker.name, Worker.silent, col(Worker.facts).is_(None))
    states = _none_of(WorkerState)
    ages: dict[tuple[str, ...], float] = {}
    for worker_id, name, silent, is_mute in (await session.exec(known)).all():
        unheard = heartbeats.unheard(worker_id or 0)
        if unheard is not None:
            ages[name,] = unheard.total_seconds()
        state = WorkerState.NOT_READY if is_mute else WorkerState.READY
        states[WorkerState.UNREACHABLE if silent else state,] += 1
    return [
        Metric("gpustack_workers", "Workers by state.", _STATE, states),
        Metric(
            "gpustack_worker_heartbeat_age_seconds",
            "Since the last heartbeat, of workers that this server has heard of.",
            ("worker",),
            ages,
        ),
    ]


async def _models_and_instances(session: ReadSession) -> list[Metric]:
    """A model is ready while one of its instances runs."""
    # More columns than the types of `select` know.
    columns: Any = (
        Instance.model_id, Instance.deleting, Instance.reported_state, Worker.silent, Instance.lost
    )  # fmt: skip
    known = select(*columns).join(Worker, col(Worker.id) == col(Instance.worker_id), isouter=True)
    instances, ready = _none_of(InstanceState), set()
    for model_id, deleting, reported, silent, lost in (await session.exec(known)).all():
        state = shown_state(
            placed=silent is not None,  # no worker has joined
            deleting=deleting,
            unreachable=bool(silent or lost),
            reported=InstanceState(reported) if reported else None,
        )
        instances[state,] += 1
        if state is InstanceState.RUNNING:
            ready.add(model_id)
    models = _none_of(("ready", "not_ready", "deleting"))
    for row_id, deleting in (await session.exec(select(Model.id, Model.deleting))).all():
        word = "ready" if row_id in ready else "not_ready"
        models["deleting" if deleting else word,] += 1
    return [
        Metric("gpustack_models", "Models by state.", _STATE, models),
        Metric("gpustack_instances", "Instances by state.", _STATE, instances),
    ]


def _none_of(states: Iterable[str]) -> Counter[tuple[str, ...]]:
    return Counter({(state,): 0 for state in states})
