"""One request to a model, from its first byte to its last."""

import time
from collections.abc import Coroutine, Iterator
from typing import Any, Final

from gpustack.errors import BadRequest, GPUStackError, NoReadyInstance, Unavailable
from gpustack.forward.address import FORWARDING
from gpustack.forward.exchange import IGNORED, Exchange, Receiver
from gpustack.forward.http1 import Headers, end_to_end, first
from gpustack.forward.listener import Server
from gpustack.forward.upstream import Call, Failure
from gpustack.gateway.answers import EngineUnreachable, ModelNotFound, refuse
from gpustack.gateway.asked import Asked, understand
from gpustack.gateway.credentials import check_again
from gpustack.gateway.metering import Reader, StreamReader, UsageFilter, WholeReader
from gpustack.gateway.partial import model_of
from gpustack.gateway.plane import Plane, Stranger
from gpustack.gateway.routes import OPERATIONS
from gpustack.gateway.routing import RELAY_REFUSED, Target, not_ready
from gpustack.gateway.spool import Record
from gpustack.gateway.tables import Credential, Model, Tables
from gpustack.lib.secrets import new_secret
from gpustack.schemas.wire import PRIVATE_PREFIX

HELD_BYTES: Final = 8 * 1024 * 1024  # of a body; larger ones are streamed

_TRY_ANOTHER: Final = frozenset({429, 502, 503})  # an overloaded or dying engine's answers
_PRIVATE: Final = PRIVATE_PREFIX.encode()
#: The client's secrets are for us, framing is made anew, and an engine that compressed its
#: answer would hide the usage in it.
_KEPT_BACK: Final = frozenset(
    {
        b"authorization",
        b"cookie",
        b"x-api-key",
        b"api-key",
        b"host",
        b"content-length",
        b"expect",
        b"accept-encoding",
    }
).union(FORWARDING)
_NOT_SENT: Final = (_PRIVATE, b"x-forwarded")  # nor is it the engine's business who asks
#: Which pages may read an answer is the gateway's to say; engines let any. Nor may an engine, or
#: who has a worker, put a browser's session in another's place. Nor is `server` told.
_NOT_ANSWERED: Final = (_PRIVATE, b"access-control-", b"set-cookie", b"clear-site-data")


class Inference:
    """Receiver of a client's request and sink of an engine's answer.

    The body is held, then sent to one instance after the other until one begins to answer. A
    body of more than HELD_BYTES is streamed, and goes to another instance only if the first
    could not be reached.
    """

    __slots__ = (
        "_asked",
        "_call",
        "_credential",
        "_exchange",
        "_first_byte_at",
        "_model",
        "_operation",
        "_pieces",
        "_plane",
        "_reader",
        "_record",
        "_size",
        "_started_at",
        "_streamed",
        "_target",
        "_targets",
        "_tried",
        "_waiting",
    )

    def __init__(self, plane: Plane, exchange: Exchange, operation: str) -> None:
        self._plane = plane
        self._exchange = exchange
        self._operation = operation
        self._started_at = time.time()
        self._credential: Credential | None = None
        self._waiting = False  # for news from the server
        self._pieces: list[bytes] = []
        self._size = 0
        self._streamed = False
        self._asked: Asked | None = None
        self._model: Model | None = None
        self._targets: list[Target] = []
        self._target: Target | None = None  # the instance that has the request now
        self._tried: list[int] = []
        self._call: Call | None = None
        self._record: Record | None = None
        self._reader: Reader = Reader()
        self._first_byte_at: float | None = None

    def begin(self) -> Receiver:
        """Check who asks; the rest happens when the body is there."""
        try:
            self._credential = self._plane.identify(self._exchange)
        except Stranger:
            self._exchange.pause()  # a stranger's body is not worth our memory
            self._wait(self._identify_again())
        except GPUStackError as error:
            refuse(self._exchange, error)
            return IGNORED
        return self

    # --- the request -----------------------------------------------------------------------

    def body(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._call is None:
            self._pieces.append(chunk)
            if self._size > HELD_BYTES and not self._waiting and not self._streamed:
                self._understand_beginning()
        elif self._streamed:
            if self._call.connection is None and not self._call.started:
                self._pieces.append(chunk)  # another instance may have to be tried
            else:
                self._pieces.clear()
            self._call.write(chunk)

    def body_end(self) -> None:
        if self._waiting:
            return
        if self._streamed:
            if self._call is not None:
                self._call.finish()
        else:
            self._understand()

    def client_left(self) -> None:
        if self._call is not None:
            self._call.abort()
        self._release()
        self._settle(cut=True)

    def end_if_withdrawn(self, tables: Tables) -> None:
        """End the request, whatever has come of it, if who sent it may not any more."""
        if self._credential is None or self._exchange.finished:
            return
        try:
            check_again(self._credential, tables, self._model)
        except GPUStackError as error:
            refuse(self._exchange, error)
            self.client_left()

    def pause(self) -> None:
        if self._call is not None:
            self._call.pause()

    def resume(self) -> None:
        if self._call is not None:
            self._call.resume()

    def end_now(self) -> None: ...

    def _understand(self) -> None:
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces = []
        try:
            self._asked = understand(body, has_stream=OPERATIONS[self._operation])
        except BadRequest as error:
            refuse(self._exchange, error)
            return
        self._find()

    def _understand_beginning(self) -> None:
        """The body is too large to hold: send it on as soon as its model is known."""
        beginning = b"".join(self._pieces)
        self._pieces = [beginning]
        model = model_of(beginning[:HELD_BYTES])
        if model is None:
            message = "The first 8 MiB of the body name no model: put it first."
            refuse(self._exchange, BadRequest(message, param="model"))
            return
        self._streamed = True
        self._asked = Asked(model, b"", injected=False)
        self._find()

    # --- waiting for news --------------------------------------------------------------------

    def _wait(self, news: Coroutine[Any, Any, None]) -> None:
        self._waiting = True
        self._plane.later(self._exchange, news)

    async def _identify_again(self) -> None:
        self._credential = await self._plane.again(lambda: self._plane.identify(self._exchange))
        self._waiting = False
        if self._exchange.finished:
            return
        self._exchange.resume()
        if self._size > HELD_BYTES:
            self._understand_beginning()
        elif self._exchange.complete:
            self._understand()

    def _find(self) -> None:
        """Look the model up and send the request, now or after asking the server for news."""
        try:
            self._look_up()
        except (ModelNotFound, NoReadyInstance):
            if self._streamed:
                self._exchange.pause()
            self._wait(self._find_again())
        except GPUStackError as error:
            refuse(self._exchange, error)
        else:
            self._send()

    async def _find_again(self) -> None:
        try:
            await self._plane.again(self._look_up)
        finally:
            self._waiting = False
        if self._exchange.finished:
            return
        self._send()
        self._exchange.resume()

    def _look_up(self) -> None:
        assert self._asked is not None  # noqa: S101
        tables, then = self._plane.tables, self._credential
        if then is not None and tables.credentials.get(then.id) is not then:
            # Bodies may take their time: what began with the head has to hold at their end.
            self._credential = check_again(then, tables)
        self._model = model = self._plane.model(self._asked.model, self._credential)
        self._targets = self._plane.routing.targets(tables, model)
        if not self._targets:
            raise NoReadyInstance(not_ready(tables, model))

    # --- the engine --------------------------------------------------------------------------

    def _send(self) -> bool:
        """Send the request to the best instance not tried yet; False: there is none."""
        plane, asked = self._plane, self._asked
        now = plane.now()
        target = plane.routing.choose(self._targets, self._tried, now)
        if target is None or asked is None:
            return False
        self._target = target
        self._tried.append(target.instance_id)
        plane.routing.counts.add(target.instance_id, 1)
        if self._record is None:
            self._record = self._new_record(asked.model)
            plane.ledger.start(self._record)
        self._record.instance_id = target.instance_id
        self._call = plane.pool.send(
            target.address,
            "POST",
            self._engine_path(),
            self._engine_headers(target),
            self,
            repeatable=True,  # a completion leaves nothing behind but its usage
            body=None if self._streamed else asked.body,
            chunked=self._exchange.header(b"content-length") is None,
            certificate=target.certificate,
        )
        if self._streamed:
            self._exchange.resume()  # an instance that was tried before may have paused it
            self._call.write(b"".join(self._pieces))
            if self._exchange.complete:
                self._call.finish()
        return True

    def _engine_path(self) -> bytes:
        query = self._exchange.query
        path = f"/v1/{self._operation}"
        return (f"{path}?{query}" if query else path).encode("latin-1")

    def _engine_headers(self, target: Target) -> Headers:
        headers = [
            pair
            for pair in end_to_end(self._exchange.headers)
            if pair[0] not in _KEPT_BACK and not pair[0].startswith(_NOT_SENT)
        ]
        if self._streamed:
            length = self._exchange.header(b"content-length")
            if length is not None:
                headers.append((b"content-length", length))
        headers += target.headers
        return headers

    def head(self, status: int, headers: Headers) -> None:
        target = self._target
        if target is not None:
            if first(headers, RELAY_REFUSED) is not None:
                self._drop_call()
                self._failed(target, Failure.LOST if self._streamed else Failure.UNCONNECTED)
                return
            if status == 401:
                # The client's key never went there: it is our secret that is not the engine's,
                # whose instance has just been started anew or is another's by now.
                self._drop_call()
                self._failed(target, Failure.LOST)
                return
            if status in _TRY_ANOTHER and not self._streamed and self._has_another():
                self._drop_call()
                self._release()
                self._send()
                return
            target.answered()
        self._first_byte_at = time.time()
        kept = [
            pair
            for pair in end_to_end(headers)
            if pair[0] != b"server" and not pair[0].startswith(_NOT_ANSWERED)
        ]
        if status == 200:
            self._reader = self._choose_reader(headers)
            if isinstance(self._reader, UsageFilter):
                kept = [pair for pair in kept if pair[0] != b"content-length"]
        self._asked = None  # nothing is sent again: let go of the body
        self._pieces = []
        self._exchange.start(status, kept)

    def _choose_reader(self, headers: Headers) -> Reader:
        kind = first(headers, b"content-type") or b""
        if not kind.startswith(b"text/event-stream"):
            return WholeReader()
        if self._asked is not None and self._asked.injected:
            return UsageFilter()
        return StreamReader()

    def _has_another(self) -> bool:
        return len(self._targets) > len(self._tried)

    def piece(self, piece: bytes) -> None:
        self._exchange.write(self._reader.feed(piece))

    def end(self, last: bytes) -> None:
        last = self._reader.feed(last) + self._reader.rest()
        self._release()
        self._exchange.finish(last)
        self._settle()

    def failed(self, failure: Failure) -> None:
        if self._target is not None:
            self._failed(self._target, failure)

    def _failed(self, target: Target, failure: Failure) -> None:
        """The instance gave no whole answer: try another if nobody has seen any of it."""
        target.failed(self._plane.now())
        self._release()
        if failure is Failure.BROKEN:
            self._exchange.abort()  # the client must see that the rest is missing
            self._settle(cut=True)
            return
        if (failure.unsent or not self._streamed) and self._send():
            return
        if failure is Failure.UNTRUSTED:
            why = "its worker does not show the certificate with which it registered"
            refuse(self._exchange, Unavailable(f"The last instance was sent nothing: {why}."))
        elif failure is Failure.UNCONNECTED:
            refuse(self._exchange, Unavailable("No instance of this model can be reached."))
        else:
            refuse(self._exchange, EngineUnreachable())
        self._settle()

    def pause_body(self) -> None:
        self._exchange.pause()

    def resume_body(self) -> None:
        self._exchange.resume()

    def _drop_call(self) -> None:
        if self._call is not None:
            self._call.abort()

    def _release(self) -> None:
        """The instance is no longer busy with this request."""
        target, self._target = self._target, None
        if target is not None:
            self._plane.routing.counts.add(target.instance_id, -1)

    # --- usage -------------------------------------------------------------------------------

    def _new_record(self, model: str) -> Record:
        known = self._credential
        return Record(
            request_id=new_secret(),
            model_id=self._model.id if self._model is not None else 0,
            model=model,
            operation=self._operation,
            started_at=self._started_at,
            credential_id=known.id if known is not None else None,
            user_id=known.user_id if known is not None else None,
            prompt_tokens=self._size // 4,  # about; the engine says it better at the end
        )

    def _settle(self, *, cut: bool = False) -> None:
        """Write down how it ended, once."""
        record, self._record = self._record, None
        if record is None:
            return
        now = time.time()
        record.status = self._exchange.status
        record.cut = cut
        record.total_ms = (now - self._started_at) * 1000
        if self._first_byte_at is not None:
            record.first_byte_ms = (self._first_byte_at - self._started_at) * 1000
        tokens = self._reader.tokens()
        if tokens is not None:
            record.prompt_tokens, record.completion_tokens = tokens.prompt, tokens.completion
        elif cut or record.status == 200:
            record.completion_tokens = self._reader.guess()
            record.estimated = True
        else:
            record.prompt_tokens = 0
        self._plane.ledger.end(record)


def open_requests(listener: Server) -> Iterator[Inference]:
    """The requests to models that are not answered to their end."""
    for connection in listener.connections:
        for exchange in connection.queue:
            if isinstance(exchange.receiver, Inference) and not exchange.finished:
                yield exchange.receiver
