"""The routes that gateway and relay answer themselves, as data: a test walks through them all."""

from typing import Final, NamedTuple


class Route(NamedTuple):
    """One route.

    Attributes:
        public: answered without credentials.
    """

    method: str
    pattern: str
    public: bool = False


PROBES: Final = (
    Route("GET", "/healthz", public=True),
    Route("GET", "/readyz", public=True),
    Route("GET", "/version", public=True),
)

_PREFIXES: Final = ("/v1", "/v1-openai")

GATEWAY: Final = (
    *PROBES,
    *(
        Route(method, prefix + path)
        for prefix in _PREFIXES
        for method, path in (
            ("POST", "/chat/completions"),
            ("POST", "/completions"),
            ("POST", "/embeddings"),
            ("POST", "/rerank"),
            ("GET", "/models"),
            ("GET", "/models/{id}"),
        )
    ),
    Route("POST", "/v2/rerank"),
)

#: All else goes to the agent, which checks credentials itself.
RELAY: Final = (*PROBES, Route("*", "/{any} with x-gpustack-instance"))
