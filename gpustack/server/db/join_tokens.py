"""Tokens that let workers register: the cluster's own, and those that end."""

import secrets
from datetime import timedelta
from pathlib import Path

from sqlmodel import col, delete, select

from gpustack.errors import Unauthorized
from gpustack.lib.platform import write_private
from gpustack.lib.secrets import digest, new_secret
from gpustack.schemas.credentials import CredentialKind, JoinTokenCreate
from gpustack.schemas.workers import Registration
from gpustack.server.db.database import ReadSession, WriteSession, find
from gpustack.server.db.tables import Cluster, Credential, Worker, now

_ANOTHER = "make another with `gpustack token create` on the server"


async def create(session: WriteSession, wanted: JoinTokenCreate) -> tuple[Credential, str]:
    """A new token's row, and its value, which is kept nowhere. Those that have ended go."""
    await session.exec(
        delete(Credential).where(
            col(Credential.kind) == CredentialKind.JOIN, col(Credential.expires_at) <= now()
        )
    )
    prefix = f"gpustack_join_{secrets.token_hex(8)}"
    value = f"{prefix}_{new_secret()}"
    row = Credential(
        kind=CredentialKind.JOIN,
        digest=digest(value),
        prefix=prefix,
        description=wanted.description,
        reusable=wanted.reusable,
        scopes=[],
        expires_at=now() + timedelta(seconds=wanted.expires_in),
    )
    session.add(row)
    await session.flush()
    return row, value


async def join_token(session: ReadSession, secret: str) -> Credential | None:
    """The token's row, whether or not it still lets anybody in; None: it is none."""
    its = (Credential.digest == digest(secret), Credential.kind == CredentialKind.JOIN)
    return (await session.exec(select(Credential).where(*its))).one_or_none()


async def admit(session: WriteSession, token_id: int, said: Registration) -> Credential:
    """The token, locked, if it lets this worker register.

    One that is used up lets in again whom it let in, in the same life of its agent: the answer may
    have been lost. Only that agent and the server know the run id.

    Raises:
        Unauthorized: it does not, or no longer.
    """
    row = await find(session, Credential, token_id)
    if row is None or row.expires_at is None or row.expires_at <= now():
        raise Unauthorized(f"this join token has expired or was deleted: {_ANOTHER}")
    if row.worker_id is not None:
        user = await session.get_one(Worker, row.worker_id)
        same_life = (user.name, user.machine_id, user.run_id) == (
            said.name, said.machine_id, said.run_id,
        )  # fmt: skip
        if not same_life:
            raise Unauthorized(
                f"this join token was for one worker, and {user.name} has used it: {_ANOTHER}"
            )
    return row


async def rotate(session: WriteSession, data_dir: Path) -> str:
    """A new token of the cluster's own. The one before lets nobody in after the commit.

    It is in the file before the database says that it exists, as at the cluster's first start.
    """
    cluster = await find(session, Cluster, 1)
    assert cluster is not None  # noqa: S101  bootstrap made it
    value = new_secret()
    cluster.token_digest = digest(value)
    await session.flush()
    write_private(data_dir / "token", value + "\n")
    return value
