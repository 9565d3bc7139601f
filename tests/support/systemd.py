"""A systemd of the tests' own: the manager of a user, in name spaces that end with it.

Needs root and systemd. What it starts is seen from outside as any other process.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.wait import soon

_PROGRAM = Path("/lib/systemd/systemd")
#: The first process of the name space: when it ends, everything in it does.
_FIRST = """
mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system "$XDG_RUNTIME_DIR"
"$0" --user & wait
"""


def lacking() -> str | None:
    """What this machine lacks for a systemd, and how to get it; None: nothing."""
    if not _PROGRAM.exists() or shutil.which("systemctl") is None:
        return "a service manager needs systemd: apt-get install systemd"
    if os.geteuid() != 0:
        return "a service manager of the tests' own needs root"
    return None


class UserManager:
    """A running `systemd --user`.

    Attributes:
        variables: for whoever talks to it.
    """

    def __init__(self, home: Path, first: int) -> None:
        self.variables = _variables(home)
        self._enter = ["nsenter", "--mount", "--pid", f"--target={first}"]

    def run(self, *command: str, status: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command where the manager is; it must end with `status`."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("GPUSTACK_")}
        done = subprocess.run(
            [*self._enter, *command],
            env=clean | self.variables | more,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == status, f"{command}: {done.stdout}{done.stderr}"
        return done


def _variables(home: Path) -> dict[str, str]:
    own = {"HOME": str(home), "XDG_CONFIG_HOME": str(home / "config")}
    return own | {"XDG_RUNTIME_DIR": "/run/user-of-tests"}


@contextlib.contextmanager
def user_manager(home: Path) -> Iterator[UserManager]:
    """A manager whose units are below `home`; gone afterwards, with all that it started."""
    with subprocess.Popen(
        ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child",
         "/bin/sh", "-c", _FIRST, str(_PROGRAM)],
        env=os.environ | _variables(home), stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as outer:  # fmt: skip
        try:
            children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
            first = soon(lambda: children.read_text().split(), "the name space's first process")
            made = UserManager(home, int(first[0]))
            soon(lambda: _answers(made), "the manager answers")
            yield made
        finally:
            outer.kill()


def _answers(made: UserManager) -> bool:
    with contextlib.suppress(AssertionError):
        made.run("systemctl", "--user", "show", "--property=Version")
        return True
    return False
