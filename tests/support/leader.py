"""A server that leads, in a process of its own: it writes models named `<token>-<number>`.

python -m tests.support.leader HOLDER LASTS_S RENEW_EVERY_S [freeze], the database's URL on standard
input. With `freeze` it stops itself (SIGSTOP) in the middle of its third transaction. It says what
it has done, a word per line: `leads`, `wrote`, or `lost`.
"""

import asyncio
import itertools
import os
import signal
import sys

from gpustack.errors import LeaseLost
from gpustack.schemas.models import PlacementStrategy
from gpustack.server.db.database import Database
from gpustack.server.db.leases import Leases, _token
from gpustack.server.db.tables import Model
from gpustack.server.leading import lead


def say(word: str) -> None:
    print(word, flush=True)  # noqa: T201


async def main(holder: str, lasts_s: str, renew_every_s: str, freeze: str = "") -> None:
    url = sys.stdin.readline().strip()
    db, leases = Database(url), Leases(url, holder, lasts_s=float(lasts_s))

    async def work() -> None:
        say("leads")
        for number in itertools.count(1):
            try:
                async with db.write() as session:
                    session.add(model(f"{_token.get()}-{number}"))
                    await session.flush()
                    if freeze and number == 3:
                        os.kill(os.getpid(), signal.SIGSTOP)
            except LeaseLost:
                say("lost")
                raise
            say("wrote")
            await asyncio.sleep(0.01)

    await lead(leases, work, renew_every_s=float(renew_every_s))


def model(name: str) -> Model:
    return Model(
        name=name,
        replicas=0,
        placement_strategy=PlacementStrategy.SPREAD,
        worker_selector={},
        restart_on_error=True,
    )


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
