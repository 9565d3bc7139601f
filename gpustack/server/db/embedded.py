"""A PostgreSQL of the node's own: `--database-url embedded://`.

Role `database` owns it: started before the server needs it, stopped after the server. One whose
role was killed goes on, and the next role takes it over.
"""

import asyncio
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from gpustack.config.load import from_json
from gpustack.config.options import Settings
from gpustack.errors import SettingsError
from gpustack.lib.locks import take_over
from gpustack.lib.platform import lock
from gpustack.lib.role import Boot, Leave, leave

if TYPE_CHECKING:
    from gpustack.server.db.postgres import Postgres

logger = logging.getLogger(__name__)

SCHEME = "embedded://"
LOCK = "database.lock"
#: How long a role whose launcher is gone waits for a successor.
SUCCESSOR_S = 10.0
POLL_S = 0.05


def embedded(settings: Settings) -> "Postgres | None":
    """The PostgreSQL of these settings' own; None: they name another database."""
    if not settings.database_url.reveal().startswith(SCHEME):
        return None
    from gpustack.server.db.postgres import Postgres  # psutil: not for every start

    return Postgres(settings.data_dir / "postgres")


def database_url(settings: Settings) -> str:
    """Where the database is: what --database-url says, or the socket of the embedded one."""
    own = embedded(settings)
    return own.url if own else settings.database_url.reveal()


async def serve(boot: Boot) -> None:
    """Run the database until the launcher says otherwise.

    Raises:
        SettingsError: it cannot be started, or has ended by itself.
    """
    from gpustack.server.db.postgres import Postgres

    settings = from_json(boot.settings)
    postgres, its_lock = Postgres(settings.data_dir / "postgres"), settings.data_dir / LOCK
    with ExitStack() as held:
        await asyncio.to_thread(held.enter_context, take_over(its_lock))
        await postgres.start()
        told, ended = asyncio.ensure_future(leave()), asyncio.ensure_future(postgres.ended())
        await asyncio.wait({told, ended}, return_when=asyncio.FIRST_COMPLETED)
        if not told.done():
            told.cancel()
            raise SettingsError("the embedded PostgreSQL has ended by itself")
        ended.cancel()
        if told.result() is Leave.STOP:
            await postgres.stop()
            return
    # The launcher is gone. Mostly it was only replaced, and the server should notice nothing.
    if not await _has_successor(its_lock):
        await postgres.stop()


async def _has_successor(path: Path) -> bool:
    """Whether another role takes the lock soon."""
    for _ in range(round(SUCCESSOR_S / POLL_S)):
        with path.open("rb") as file:
            if not lock(file, shared=True):
                return True
        await asyncio.sleep(POLL_S)
    return False
