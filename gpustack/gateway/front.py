"""The gateway's application: what each request is, and who answers it."""

from typing import Final
from urllib.parse import unquote

from gpustack.errors import GPUStackError, NotFound, Unavailable
from gpustack.forward.address import is_forwarding
from gpustack.forward.exchange import IGNORED, Exchange, Receiver
from gpustack.forward.upstream import Failure
from gpustack.gateway.answers import MethodNotAllowed, ModelNotFound, openai, refuse
from gpustack.gateway.arriving import Arriving, pass_to_agent
from gpustack.gateway.credentials import is_for, may_use
from gpustack.gateway.inference import Inference
from gpustack.gateway.passing import Passing, is_endless, without_private
from gpustack.gateway.plane import Plane, Stranger
from gpustack.gateway.probes import PROBE_PATHS, probe
from gpustack.gateway.routes import MODELS, OPERATIONS, PREFIXES, RERANK, TUNNEL, WATCH
from gpustack.gateway.tables import Credential, Model
from gpustack.schemas import wire

_PRIVATE: Final = wire.PRIVATE_PREFIX.encode()
_MODEL: Final = f"{MODELS}/"
_AGENTS: Final = f"{TUNNEL.pattern}/"


class Front:
    """Called once per request, when its head is there."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane

    def __call__(self, exchange: Exchange) -> Receiver:
        path = exchange.path
        for prefix in PREFIXES:
            if path.startswith(prefix):
                exchange.dialect = openai
                return self._model_api(exchange, path[len(prefix) :])
        if (exchange.method, path) == (RERANK.method, RERANK.pattern):
            exchange.dialect = openai
            return Inference(self._plane, exchange, "rerank").begin()
        if path in PROBE_PATHS and exchange.method in ("GET", "HEAD"):
            probe(exchange, self._not_ready())
            return IGNORED
        if path.startswith(TUNNEL.pattern):
            if (exchange.method, path) == (TUNNEL.method, TUNNEL.pattern):
                return Arriving(self._plane, exchange).begin()
            if path.startswith(_AGENTS):
                return pass_to_agent(self._plane, exchange, path[len(_AGENTS) :])
        return self._pass(exchange)

    def _not_ready(self) -> str | None:
        return "no tables yet" if self._plane.watch.tables is None else None

    # --- models ------------------------------------------------------------------------------

    def _model_api(self, exchange: Exchange, operation: str) -> Receiver:
        if operation in OPERATIONS and exchange.method == "POST":
            return Inference(self._plane, exchange, operation).begin()
        asking = Asking(self._plane, exchange, operation)
        return asking.begin()

    # --- everything else ---------------------------------------------------------------------

    def _pass(self, exchange: Exchange) -> Receiver:
        plane = self._plane
        headers = [
            pair
            for pair in without_private(exchange.headers, _PRIVATE)
            if not is_forwarding(pair[0])  # what is true of it is said below
        ]
        headers += [
            (wire.GATEWAY_HEADER.encode(), plane.credential.encode()),
            (wire.PEER_HEADER.encode(), exchange.peer.encode()),
            (wire.SCHEME_HEADER.encode(), exchange.scheme),
        ]
        if plane.needs_no_login(exchange):
            headers.append((wire.LOCAL_HEADER.encode(), b"1"))
        if exchange.vouched:
            headers.append((wire.VOUCHED_HEADER.encode(), b"1"))
        exchange.endless = exchange.path == WATCH or is_endless(exchange.query)
        return Passing(
            plane.pool,
            exchange,
            plane.server,
            headers,
            _server_away,
            patience_s=plane.server_patience_s,
        )


class Asking:
    """A request below /v1 that needs no engine: the lists of models, and what does not exist."""

    def __init__(self, plane: Plane, exchange: Exchange, operation: str) -> None:
        self._plane = plane
        self._exchange = exchange
        self._operation = operation

    def begin(self) -> Receiver:
        try:
            self._answer(self._plane.identify(self._exchange))
        except (Stranger, ModelNotFound):
            self._plane.later(self._exchange, self._again())
        except GPUStackError as error:
            refuse(self._exchange, error)
        return IGNORED

    async def _again(self) -> None:
        await self._plane.again(self._begin_again)

    def _begin_again(self) -> None:
        self._answer(self._plane.identify(self._exchange))

    def _answer(self, credential: Credential | None) -> None:
        operation, tables = self._operation, self._plane.tables
        if operation in OPERATIONS:
            raise MethodNotAllowed(f"Use POST for /v1/{operation}.")
        if operation != MODELS and not operation.startswith(_MODEL):
            raise NotFound(f"There is no /v1/{operation}.")
        if self._exchange.method not in ("GET", "HEAD"):
            raise MethodNotAllowed(f"Use GET for /v1/{operation}.")
        if operation == MODELS:
            there = [
                _shown(model)
                for model in tables.models.values()
                if not model.deleting
                and is_for(credential, model.name)
                and may_use(credential, model)
            ]
            self._exchange.respond_json(200, {"object": "list", "data": there})
            return
        model = self._plane.model(unquote(operation[len(_MODEL) :]), credential)
        self._exchange.respond_json(200, _shown(model))


def _shown(model: Model) -> dict[str, object]:
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.created_at.timestamp()),
        "owned_by": "gpustack",
    }


def _server_away(exchange: Exchange, failure: Failure) -> None:
    message = "The server is away; it should be back in a moment."
    if failure is Failure.LOST:
        message = "The server gave no answer: look whether it did what was asked, then try again."
    exchange.respond_error(Unavailable(message))
