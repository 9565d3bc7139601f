"""What the server is told of instances: the newest status, along legal moves, until it answers."""

import asyncio
import logging
from collections.abc import Callable

from gpustack.client.agents import AgentClient
from gpustack.errors import Conflict, Forbidden, GPUStackError, NotFound, Unauthorized
from gpustack.lib.backoff import delay_s
from gpustack.schemas.instances import AssignedInstance, InstanceState, InstanceStatus, can_move

logger = logging.getLogger(__name__)

#: An echo of an older report may arrive this long after a newer one, seconds.
ECHO_S = 5.0


class Reports:
    """The status of each instance as it is, and as the server was told last.

    Args:
        ended: told once the server knows that an instance is gone from this worker.
        unknown: told when the server does not know an instance (any more).
        echo_s: what the server shows is not compared for so long after a report.
    """

    def __init__(
        self,
        ended: Callable[[int], None],
        unknown: Callable[[int], None],
        *,
        echo_s: float = ECHO_S,
    ) -> None:
        self._ended = ended
        self._unknown = unknown
        self._echo_s = echo_s
        self._now: dict[int, InstanceStatus] = {}
        self._told: dict[int, InstanceStatus] = {}
        self._told_at: dict[int, float] = {}
        self._shown: dict[int, InstanceState] = {}
        self._asked: set[int] = set()
        self._news = asyncio.Event()

    def put(self, id: int, status: InstanceStatus) -> None:
        """This is how it is now. What was not sent yet is replaced."""
        if self._now.get(id) != status:
            self._now[id] = status
            self._news.set()

    def forget(self, id: int) -> None:
        for table in (self._now, self._told, self._told_at, self._shown):
            table.pop(id, None)
        self._asked.discard(id)

    def hear(self, instance: AssignedInstance) -> None:
        """See what the server shows; if it is not what it was told, it is told again.

        At once if we were silent for it: that is no echo of ours, and it waits for a word.
        """
        self._shown[instance.id] = instance.state
        if instance.state is InstanceState.UNREACHABLE:
            self._asked.add(instance.id)
            self._news.set()
            return
        told = self._told.get(instance.id)
        if told is None or instance.deleting or told.state is instance.state:
            return
        if asyncio.get_running_loop().time() - self._told_at[instance.id] > self._echo_s:
            del self._told[instance.id]
            self._news.set()

    async def send(
        self, client: AgentClient, *, first_s: float = 0.2, limit_s: float = 10.0
    ) -> None:
        """Tell the server each change, for ever.

        Raises:
            Unauthorized: the server does not know this worker's credential.
        """
        failures = 0
        while True:
            self._news.clear()
            try:
                await self.send_pending(client)
            except (Unauthorized, Forbidden):
                raise
            except GPUStackError as error:
                failures += 1
                if failures == 1:
                    logger.warning("cannot report instances, trying again: %s", error)
                await asyncio.sleep(delay_s(failures, first_s=first_s, limit_s=limit_s))
            else:
                failures = 0
                await self._news.wait()

    async def send_pending(self, client: AgentClient) -> None:
        """Tell the server what it was not told yet."""
        for id, status in list(self._now.items()):
            if id in self._asked or self._told.get(id) != status:
                await self._send(client, id, status)

    async def _send(self, client: AgentClient, id: int, status: InstanceStatus) -> None:
        if id in self._asked:
            self._asked.discard(id)
            self._told.pop(id, None)  # until it has heard this
        told = self._told.get(id)
        before = told.state if told else self._shown.get(id)
        try:
            if before is not None and not can_move(before, status.state):
                await client.report_instance(id, _starting(status))
            try:
                await client.report_instance(id, status)
            except Conflict:
                # The server's last word from us is another than we know, from a life before.
                if status.state is InstanceState.GONE:
                    raise
                await client.report_instance(id, _starting(status))
                await client.report_instance(id, status)
        except NotFound:
            self._unknown(id)
        except Conflict as error:
            logger.warning("the server refuses a report on instance %d: %s", id, error)
        self._told[id] = status
        self._told_at[id] = asyncio.get_running_loop().time()
        if status.state is InstanceState.GONE:
            self._ended(id)


def _starting(status: InstanceStatus) -> InstanceStatus:
    """The step that leads from every state of a placed instance to every other."""
    return status.model_copy(
        update={"state": InstanceState.STARTING, "state_message": "", "download_progress": None}
    )
