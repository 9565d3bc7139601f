"""The routes that gateway and relay answer themselves: what `Front` and `Relay` go by.

A test walks through them all.
"""

from typing import Final, NamedTuple

from gpustack.schemas.wire import TUNNEL_PATH


class Route(NamedTuple):
    """One route.

    Attributes:
        public: answered without credentials.
    """

    method: str
    pattern: str
    public: bool = False


HEALTH: Final = Route("GET", "/healthz", public=True)
PROBES: Final = (
    HEALTH,
    Route("GET", "/readyz", public=True),
    Route("GET", "/version", public=True),
)

#: Where the OpenAI-compatible API is; the second is for older clients.
PREFIXES: Final = ("/v1/", "/v1-openai/")
#: Path below a prefix -> whether its answers can be streams that end with their usage.
OPERATIONS: Final = {
    "chat/completions": True,
    "completions": True,
    "embeddings": False,
    "rerank": False,
}
MODELS: Final = "models"
#: Where changes are followed for as long as the client likes.
WATCH: Final = "/v2/watch"
RERANK: Final = Route("POST", "/v2/rerank")
#: For relays, to have requests sent back; below it, for this node's server: a worker's agent.
TUNNEL: Final = Route("GET", TUNNEL_PATH)
AGENTS: Final = Route("*", f"{TUNNEL_PATH}/{{worker_id}}/{{any}}")

GATEWAY: Final = (
    *PROBES,
    *(Route("POST", prefix + operation) for prefix in PREFIXES for operation in OPERATIONS),
    *(Route("GET", prefix + path) for prefix in PREFIXES for path in (MODELS, f"{MODELS}/{{id}}")),
    RERANK,
    TUNNEL,
    AGENTS,
)


def is_inference(method: str, path: str) -> bool:
    """Whether a request is for a model."""
    if method != "POST":
        return False
    below = next((path[len(each) :] for each in PREFIXES if path.startswith(each)), "")
    return below in OPERATIONS or path == RERANK.pattern


#: All else goes to the agent, which checks credentials itself.
RELAY: Final = (HEALTH, Route("*", "/{any} with x-gpustack-instance"))
