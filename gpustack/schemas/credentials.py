"""Who may do what: one table for every secret that opens something."""

from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, Field, Strict

from gpustack.schemas.base import Body, OneLine, Schema, Time
from gpustack.schemas.models import Name


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
    """A credential as gateways see it: never the secret, only its digest.

    Attributes:
        is_admin, group_ids: of its user. An administrator calls every model.
    """

    id: int
    kind: CredentialKind
    digest: str
    user_id: int | None = None
    worker_id: int | None = None
    scopes: list[Scope]
    allowed_model_names: list[str] | None = None
    expires_at: Time | None = None
    password_change_required: bool = False
    user_disabled: bool = False
    is_admin: bool = False
    group_ids: list[int] = []


Scopes = Annotated[
    list[Annotated[Scope, Strict(False)]],
    Field(min_length=1, max_length=len(Scope)),
    AfterValidator(lambda scopes: sorted(set(scopes))),
]
ModelNames = Annotated[
    list[Name], Field(max_length=1000), AfterValidator(lambda names: sorted(set(names)))
]


class ApiKeySpec(Body):
    """What users say of a key. Its name is its user's alone to give, and only once."""

    name: OneLine = Field(min_length=1, max_length=128)
    description: str | None = None


class ApiKeyUpdate(ApiKeySpec):
    """Body of PUT /v2/api-keys/{id}.

    Attributes:
        scope: what it is for; None: as before.
        allowed_model_names: it runs no others; None: all. As before where it is not said.
        generation: the generation that was read; a newer one is a conflict. None: do not compare.
    """

    scope: Scopes | None = None
    allowed_model_names: ModelNames | None = None
    generation: int | None = None


class ApiKeyCreate(ApiKeySpec):
    """Body of POST /v2/api-keys.

    Attributes:
        scope: what it is for.
        allowed_model_names: it runs no others; None: all.
    """

    scope: Scopes = [Scope.ALL]
    allowed_model_names: ModelNames | None = None
    expires_in: int | None = Field(
        None, ge=1, le=10 * 365 * 86400, description="Seconds from now, ten years at most."
    )


class ApiKey(Schema):
    """An API key as its user sees it.

    Attributes:
        scope: what it is for.
        allowed_model_names: it runs no others; None: all.
        last_used_at: for a model, the management API or metrics, to within some seconds; None:
            never. Watches do not tell of it, and to list the models below /v1 is no use.
    """

    id: int
    name: str
    description: str | None = None
    scope: list[Scope]
    allowed_model_names: list[str] | None = None
    user_id: int
    prefix: str
    generation: int
    created_at: Time
    expires_at: Time | None = None
    last_used_at: Time | None = None


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
        server_fingerprint: of the key with which the server speaks TLS; None: it does not.
        server_is_vouched_for: the server's system has an authority that vouches for its
            certificate at `server_url`, so workers' systems may have it too.
    """

    value: str
    server_url: str
    server_fingerprint: str | None = None
    server_is_vouched_for: bool = False


class ClusterToken(Schema):
    """The cluster's own token, the one time that it is shown.

    Attributes:
        is_option: this server was started with a token among its options: the next start makes
            that one the cluster's again.
    """

    value: str
    is_option: bool
