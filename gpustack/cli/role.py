"""`python -m gpustack.cli.role NAME`: one role of a node, started by its launcher."""

import gc
import importlib
import sys

from gpustack.lib import logs, platform
from gpustack.lib.role import Boot

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
    serve = importlib.import_module(ROLES[name]).serve
    # What was imported stays for ever: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    platform.run(serve(boot))


if __name__ == "__main__":
    main()
