"""Cross-origin requests: what a browser may let pages of other sites do here.

Answered in one place for all that the public ports serve. It grants nothing by itself: a foreign
page needs a credential like everybody else, and the loopback rule never holds for it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gpustack.config.options import Settings
from gpustack.errors import Forbidden
from gpustack.forward.exchange import IGNORED, Exchange, Receiver
from gpustack.forward.http1 import Headers, first
from gpustack.forward.listener import App

ANY = "*"
#: How long a browser may remember an answer to a preflight, seconds.
REMEMBER_S = 600

_VARY = (b"vary", b"Origin")


@dataclass(frozen=True, slots=True)
class Policy:
    """PURE: who may ask for what, as the options say."""

    origins: frozenset[str]
    methods: tuple[str, ...]
    headers: tuple[str, ...]
    credentials: bool

    @classmethod
    def of(cls, settings: Settings) -> "Policy | None":
        """The policy of `settings`; None: cross-origin requests are not answered."""
        if not settings.enable_cors:
            return None
        return cls(
            frozenset(origin.lower() for origin in settings.allow_origins),
            tuple(method.upper() for method in settings.allow_methods),
            settings.allow_headers,
            settings.allow_credentials,
        )

    def allows(self, origin: bytes) -> bool:
        return ANY in self.origins or origin.decode("latin-1").lower() in self.origins

    def answer(self, origin: bytes | None) -> Headers:
        """What every answer to a request from `origin` (None: no page of another site) says."""
        everybody = ANY in self.origins
        said = [] if everybody else [_VARY]
        if origin is None or not self.allows(origin):
            return said
        said.append((b"access-control-allow-origin", b"*" if everybody else origin))
        if self.credentials:
            said.append((b"access-control-allow-credentials", b"true"))
        return said

    def vouches(self, origin: bytes) -> bool:
        """Whether its pages may act with their user's session: only where it is named."""
        return self.credentials and origin.decode("latin-1").lower() in self.origins

    def preflight(self, method: bytes, headers: bytes | None) -> Headers:
        """What an allowed origin may do; `method` and `headers` are what it asks for."""
        methods = method if ANY in self.methods else _joined(self.methods)
        allowed = headers if ANY in self.headers else _joined(self.headers)
        said = [
            (b"access-control-allow-methods", methods),
            (b"access-control-max-age", b"%d" % REMEMBER_S),
        ]
        return [*said, (b"access-control-allow-headers", allowed)] if allowed else said


def _joined(words: Iterable[str]) -> bytes:
    return ", ".join(words).encode("latin-1")


def around(app: App, policy: Policy | None) -> App:
    """`app`, answering pages of other origins as `policy` says; without one `app` itself."""
    if policy is None:
        return app

    def answer(exchange: Exchange) -> Receiver:
        origins = [value for name, value in exchange.headers if name == b"origin"]
        origin = origins[0] if len(origins) == 1 else None  # no browser says two
        exchange.also = policy.answer(origin)
        exchange.vouched = origin is not None and policy.vouches(origin)
        asked = exchange.header(b"access-control-request-method")
        if exchange.method != "OPTIONS" or origin is None or asked is None:
            return app(exchange)
        if policy.allows(origin):
            wanted = first(exchange.headers, b"access-control-request-headers")
            exchange.respond(204, policy.preflight(asked, wanted))
        else:
            name = origin.decode("latin-1")[:200]
            exchange.respond_error(Forbidden(f"{name!r} is not among --allow-origins."))
        return IGNORED

    return answer
