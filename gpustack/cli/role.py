"""`python -m gpustack.cli.role NAME`: one role of a node, started by its launcher."""

import gc
import importlib
import logging
import os
import sys

from gpustack.errors import GPUStackError
from gpustack.lib import logs, platform
from gpustack.lib.role import Boot

logger = logging.getLogger(__name__)

#: Where each role's `serve(boot)` is. Imported by name: a role loads itself and no other.
ROLES = {
    "server": "gpustack.server.app",
    "gateway": "gpustack.gateway.app",
    "relay": "gpustack.gateway.relay",
    "agent": "gpustack.worker.agent",
}


def main() -> None:
    name = sys.argv[1]
    boot = Boot.read()
    logs.setup(name, debug=bool(boot.settings.get("debug")))
    logger.debug("started as pid %d", os.getpid())
    serve = importlib.import_module(ROLES[name]).serve
    # What was imported stays for ever: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    try:
        platform.run(serve(boot))
    except GPUStackError as error:
        logger.error("%s", error)  # noqa: TRY400  raised on purpose: the sentence says it all
        sys.exit(1)


if __name__ == "__main__":
    main()
