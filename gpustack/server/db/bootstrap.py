"""What a new cluster needs before anything else: its id, the join token, the first admin."""

import logging
import secrets
import string
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sqlalchemy import or_
from sqlmodel import col, select

from gpustack.lib.platform import write_private
from gpustack.lib.secrets import Secret, digest, new_secret, same
from gpustack.schemas.credentials import CredentialKind, Scope
from gpustack.server.db import leases
from gpustack.server.db.database import Database, WriteSession
from gpustack.server.db.tables import Cluster, Counter, Credential, User
from gpustack.server.db.users import first_admin

logger = logging.getLogger(__name__)

ADMIN = "admin"
PASSWORD_SYMBOLS = "!@#$%^&*_+"  # noqa: S105  the characters, not a password


async def bootstrap(
    db: Database,
    *,
    data_dir: Path,
    token: Secret | None,
    password: Secret | None,
    hash_password: Callable[[str], str],
    local_admin: str,
    gateway_credential: str,
) -> Cluster:
    """Make what is missing, once; bring this node's own credentials into the table.

    Of servers that start at once on an empty database, one makes what the cluster has.

    A generated token or password is in its file before the database says that it exists, so no
    crash can leave a cluster that nobody can enter.
    """
    async with db.write() as session:
        await leases.alone(session)
        cluster = await session.get(Cluster, 1)
        if cluster is None:
            cluster = await _new_cluster(session, data_dir, token)
        elif token is not None:
            cluster.token_digest = digest(token.reveal())
        _drop_stale(data_dir / "token", cluster)
        admin = await first_admin(session)
        if admin is None:
            admin = await _new_admin(session, data_dir, password, hash_password)
        node = f"{node_id(data_dir)} at {data_dir}"[:255]
        for kind, secret, user_id in (
            (CredentialKind.LOCAL, local_admin, admin.id),
            (CredentialKind.GATEWAY, gateway_credential, None),
        ):
            await _own_credential(session, kind, secret, user_id, node=node)
    return cluster


async def _new_cluster(session: WriteSession, data_dir: Path, token: Secret | None) -> Cluster:
    given = token.reveal() if token else new_secret()
    if token is None:
        write_private(data_dir / "token", given + "\n")
    cluster = Cluster(cluster_id=new_secret(), epoch=new_secret()[:8], token_digest=digest(given))
    session.add(cluster)
    session.add(Counter(revision=0))
    await session.flush()
    return cluster


async def _new_admin(
    session: WriteSession,
    data_dir: Path,
    password: Secret | None,
    hash_password: Callable[[str], str],
) -> User:
    first = password.reveal() if password else new_password()
    if password is None:
        write_private(data_dir / "initial_admin_password", first + "\n")
    admin = User(
        username=ADMIN,
        is_admin=True,
        password_hash=hash_password(first),
        require_password_change=password is None,
    )
    session.add(admin)
    await session.flush()
    return admin


async def _own_credential(
    session: WriteSession, kind: CredentialKind, secret: str, user_id: int | None, *, node: str
) -> None:
    """Exactly one credential of `kind` for this node, the one in its file."""
    mine = digest(secret)
    rows = (
        await session.exec(
            select(Credential).where(
                Credential.kind == kind,
                or_(col(Credential.name) == node, col(Credential.digest) == mine),
            )
        )
    ).all()
    for row in rows:
        if row.digest == mine:
            row.name = node
        else:
            await session.delete(row)
    if all(row.digest != mine for row in rows):
        scopes: list[str] = [Scope.ALL] if kind is CredentialKind.LOCAL else []
        session.add(Credential(kind=kind, name=node, digest=mine, user_id=user_id, scopes=scopes))


def _drop_stale(path: Path, cluster: Cluster) -> None:
    """Remove a token that lets nobody in: another was given, or another server rotated it."""
    try:
        stale = not same(digest(path.read_text().strip()), cluster.token_digest)
    except (OSError, ValueError):
        return
    if stale:
        logger.warning("%s held a token that is not the cluster's any more: removed", path)
        path.unlink(missing_ok=True)


def node_id(data_dir: Path) -> str:
    """What names this node over all its lives. Machines share paths."""
    path = data_dir / "node_id"
    with suppress(OSError):
        if found := path.read_text().strip():
            return found
    made = new_secret()[:12]
    write_private(path, made + "\n")
    return made


def new_password(length: int = 16) -> str:
    """A random password with an upper-case and a lower-case letter, a digit and a symbol."""
    kinds = (string.ascii_uppercase, string.ascii_lowercase, string.digits, PASSWORD_SYMBOLS)
    letters = [secrets.choice(kind) for kind in kinds]
    letters += [secrets.choice("".join(kinds)) for _ in range(length - len(kinds))]
    secrets.SystemRandom().shuffle(letters)
    return "".join(letters)
