"""Who may do what: one table for every secret that opens something."""

from enum import StrEnum

from pydantic import Field

from gpustack.schemas.base import Body, OneLine, Schema, Time


class CredentialKind(StrEnum):
    KEY = "key"  # an API key of a user
    SESSION = "session"  # a browser's login
    LOCAL = "local"  # the command line on the server's own machine
    WORKER = "worker"
    GATEWAY = "gateway"
    JOIN = "join"  # lets a worker register, and does nothing else


class Scope(StrEnum):
    ALL = "*"
    INFERENCE = "inference"
    MANAGEMENT = "management"
    METRICS = "metrics"


class Credential(Schema):
    """A credential as gateways see it: never the secret, only its digest."""

    id: int
    kind: CredentialKind
    digest: str
    user_id: int | None = None
    worker_id: int | None = None
    scopes: list[Scope]
    expires_at: Time | None = None
    password_change_required: bool = False


class ApiKeySpec(Body):
    """What users say of a key. Its name is its user's alone to give, and only once."""

    name: OneLine = Field(min_length=1, max_length=128)
    description: str | None = None


class ApiKeyUpdate(ApiKeySpec):
    """Body of PUT /v2/api-keys/{id}.

    Attributes:
        generation: the generation that was read; a newer one is a conflict. None: do not compare.
    """

    generation: int | None = None


class ApiKeyCreate(ApiKeySpec):
    expires_in: int | None = Field(
        None, ge=1, le=10 * 365 * 86400, description="Seconds from now, ten years at most."
    )


class ApiKey(Schema):
    id: int
    name: str
    description: str | None = None
    user_id: int
    prefix: str
    generation: int
    created_at: Time
    expires_at: Time | None = None


class ApiKeyCreated(ApiKey):
    """The one time that the key itself is shown."""

    value: str


class JoinTokenCreate(Body):
    """Body of POST /v2/join-tokens.

    Attributes:
        reusable: any number of workers may register with it; else one.
    """

    description: str | None = None
    reusable: bool = False
    expires_in: int = Field(
        86400, ge=1, le=365 * 86400, description="Seconds from now, a year at most."
    )


class JoinToken(Schema):
    """A token that lets workers register, without what is secret of it.

    Attributes:
        prefix: what it begins with.
        worker_id: the worker that has used it up.
    """

    id: int
    prefix: str
    description: str | None = None
    reusable: bool
    worker_id: int | None = None
    created_at: Time
    expires_at: Time


class JoinTokenCreated(JoinToken):
    """The one time that the token itself is shown.

    Attributes:
        server_url: where workers reach the server, as far as it knows.
    """

    value: str
    server_url: str


class ClusterToken(Schema):
    """The cluster's own token, the one time that it is shown.

    Attributes:
        is_option: this server was started with a token among its options: the next start makes
            that one the cluster's again.
    """

    value: str
    is_option: bool
