"""PostgreSQL tells at once what other servers commit."""

import asyncio
from collections.abc import Callable
from typing import Any, Final

from gpustack.errors import DatabaseAway
from gpustack.server.db.engines import CONNECT_S
from gpustack.server.db.failures import away
from gpustack.server.db.url import parse

#: Of the notification that goes out with a commit; what it says is the revision.
CHANNEL: Final = "gpustack_changes"
#: How often a connection on which nothing comes has to show that it is one.
CHECK_EVERY_S = 10.0


async def listen(url: str, heard: Callable[[int], None]) -> None:
    """Call `heard` with the revision of each commit, from now on, until the connection is lost.

    First with 0, as soon as none is missed.

    Raises:
        DatabaseAway: always, at the end.
    """
    import asyncpg

    place = parse(url)
    lost = asyncio.Event()

    def told(_connection: Any, _pid: int, _channel: str, revision: str) -> None:
        heard(int(revision))

    try:
        connection = await asyncpg.connect(**place.driver, timeout=CONNECT_S)
    except (OSError, asyncpg.PostgresError) as error:
        raise away(place, error) from None
    try:
        connection.add_termination_listener(lambda _: lost.set())
        await connection.add_listener(CHANNEL, told)
        heard(0)
        while not lost.is_set():
            try:
                # Not wait_for: Python 3.11 would lose a cancellation that comes with the loss.
                async with asyncio.timeout(CHECK_EVERY_S):
                    await lost.wait()
            except TimeoutError:
                await connection.execute("SELECT 1", timeout=CONNECT_S)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise away(place, error) from None
    finally:
        connection.terminate()
    raise DatabaseAway("the database has ended the connection on which it tells of changes")
