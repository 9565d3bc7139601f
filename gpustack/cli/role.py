"""`python -m gpustack.cli.role NAME`: one role of a node, started by its launcher."""

import gc
import importlib
import logging
import os
import sys
from collections.abc import Iterator

from gpustack.errors import GPUStackError
from gpustack.lib import logs, platform
from gpustack.lib.role import Boot

logger = logging.getLogger(__name__)

#: Where each role's `serve(boot)` is. Imported by name: a role loads itself and no other.
ROLES = {
    "server": "gpustack.server.app",
    "database": "gpustack.server.db.embedded",
    "gateway": "gpustack.gateway.app",
    "server+gateway": "gpustack.cli.one_process",
    "relay": "gpustack.gateway.relay",
    "agent": "gpustack.worker.agent",
}

#: Modules that libraries import where they find them, and do without where they do not: a tenth of
#: an agent's start and of a server's. Nobody here has models of pydantic 1, or runs httpx's own
#: command line, which brings rich and pygments.
UNUSED = ("httpx._main", "pydantic.v1")

#: So many new objects that the collector looks at them; so many such looks that it looks at older
#: ones too; and so on. With Python's 700 what one list page makes is old before the page is sent,
#: and a server with a thousand watches stops for 0.2 to 0.5 s every 3 s to look at all there is.
COLLECTED = (50_000, 20, 50)


def main() -> None:
    for unused in UNUSED:
        sys.modules[unused] = None  # type: ignore[assignment]  # not to be found
    gc.disable()  # while what is imported piles up there is nothing to collect
    name = sys.argv[1]
    try:
        boot = Boot.read()
    except EOFError as cut:  # it was killed as it started us
        sys.exit(f"{name} does not start: {cut}")
    logs.setup(name, debug=bool(boot.settings.get("debug")))
    logger.debug("started as pid %d", os.getpid())
    serve = importlib.import_module(ROLES[name]).serve
    # What was imported stays for ever: the collector need not look at it again.
    gc.freeze()
    gc.set_threshold(*COLLECTED)
    gc.enable()
    failed = False
    try:
        platform.run(serve(boot))
    except* GPUStackError as errors:
        failed = True
        for error in _leaves(errors):
            logger.error("%s", error)  # noqa: TRY400  raised on purpose: the sentence says it all
    if failed:
        sys.exit(1)


def _leaves(group: BaseExceptionGroup[GPUStackError]) -> Iterator[GPUStackError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


if __name__ == "__main__":
    main()
