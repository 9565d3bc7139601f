"""Where gateways elsewhere reach this worker: found at its start, and looked for again."""

import asyncio
import logging

from gpustack.config.options import Settings
from gpustack.errors import SettingsError
from gpustack.lib.net import interface_address, route_towards
from gpustack.worker.enrolment import Enrolment
from gpustack.worker.ports import LOOPBACK

logger = logging.getLogger(__name__)


def address(settings: Settings, server_url: str) -> str | None:
    """As the operator says, of the interface that he names, or of the route to the server.

    None: there is no such route now. Blocks: the server's name may have to be resolved.

    Raises:
        SettingsError: the interface has no address now.
    """
    if settings.advertise_address:
        return settings.advertise_address
    if settings.worker_ifname:
        try:
            return interface_address(settings.worker_ifname)
        except ValueError as error:  # it had one when the node started
            raise SettingsError(f"--worker-ifname: {error}") from None
    return route_towards(server_url)


async def first_address(settings: Settings, server_url: str) -> str:
    """An address for this worker's first words; `keep_address` puts it right.

    An agent that starts anew while the interface is down has engines to look after all the same.
    """
    try:
        found = await asyncio.to_thread(address, settings, server_url)
    except SettingsError as error:
        logger.warning("for now this worker has the address of its route to the server: %s", error)
        found = await asyncio.to_thread(route_towards, server_url)
    return found or LOOPBACK


async def keep_address(
    settings: Settings, server_url: str, enrolment: Enrolment, *, every_s: float
) -> None:
    """See to it that the server knows this worker's address, until cancelled.

    While there is none, such as when a cable is out, the last one stays.
    """
    said = ""
    while not settings.advertise_address:
        await asyncio.sleep(every_s)
        try:
            now = await asyncio.to_thread(address, settings, server_url)
        except SettingsError as error:
            if str(error) != said:
                logger.warning("this worker keeps its address for now: %s", error)
            said = str(error)
            continue
        said = ""
        if now is not None and now != (before := enrolment.registration.ip):
            logger.info("this worker's address is %s now; it was %s", now, before)
            enrolment.tell(ip=now)
