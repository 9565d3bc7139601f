"""What workers' agents answer to this server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from gpustack.client.failures import error_of
from gpustack.errors import BadRequest, NotFound, Unavailable
from gpustack.lib import trust
from gpustack.lib.net import url_host
from gpustack.schemas import wire
from gpustack.server.db.tables import Worker
from gpustack.server.db.workers import by_tunnel

if TYPE_CHECKING:
    import httpx

CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class OwnGateway:
    """This node's gateway, where the tunnels of workers end that cannot be dialled.

    Attributes:
        url: without TLS, on this machine.
        credential: by which it knows this server.
    """

    url: str
    credential: str


async def _gateway(request: Request) -> OwnGateway:
    found: OwnGateway = request.app.state.gateway
    return found


Gate = Annotated[OwnGateway, Depends(_gateway)]


@asynccontextmanager
async def asked(
    worker: Worker,
    method: str,
    path: str,
    *,
    gate: OwnGateway,
    query: dict[str, str] | None = None,
    body: bytes | None = None,
    read_s: float | None = CONNECT_TIMEOUT_S,
) -> "AsyncIterator[httpx.Response]":
    """The answer of a worker's API, status 200, its body still to come.

    Args:
        gate: through which workers are asked that cannot be dialled.
        read_s: how long the worker may be silent; None: for ever.

    Raises:
        NotFound, BadRequest: so the worker says.
        Unavailable: it cannot be reached, or does not answer as it should.
    """
    import httpx  # rarely needed, and it would make every start slower

    tls = None
    if by_tunnel(worker):
        url = f"{gate.url}{wire.TUNNEL_PATH}/{worker.id}{path}"
        headers = {
            "Authorization": f"Bearer {gate.credential}",
            wire.AGENT_HEADER: worker.agent_secret,
        }
    else:
        tls = trust.exactly(worker.certificate) if worker.certificate else None
        scheme = "http" if tls is None else "https"
        url = f"{scheme}://{url_host(worker.ip)}:{worker.port}{path}"
        headers = {"Authorization": f"Bearer {worker.agent_secret}"}
    timeout = httpx.Timeout(CONNECT_TIMEOUT_S, read=read_s)
    try:
        async with (
            httpx.AsyncClient(timeout=timeout, trust_env=False, verify=tls or False) as client,
            client.stream(method, url, params=query, content=body, headers=headers) as answer,
        ):
            if answer.status_code != httpx.codes.OK:
                said = error_of(answer.status_code, await answer.aread())
                if isinstance(said, NotFound | BadRequest):
                    raise type(said)(f"worker {worker.name}: {said}")
                raise Unavailable(f"worker {worker.name} answered {answer.status_code}: {said}")
            yield answer
    except httpx.HTTPError as error:
        raise Unavailable(f"worker {worker.name} cannot be reached: {_why(error)}") from None


def _why(error: "httpx.HTTPError") -> str:
    import httpx

    if trust.tls_error(error) is not None:
        return "it does not show the certificate with which it registered"
    if isinstance(error, httpx.TimeoutException):  # these carry no text
        return f"it does not answer within {CONNECT_TIMEOUT_S:g} s"
    return str(error) or type(error).__name__
