"""systemd, launchd and WinSW: how each is told of a service, and what it says of one."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gpustack.cli.service_files import LABEL, NAME
from gpustack.errors import Forbidden, NotFound, Unavailable
from gpustack.lib.text import plain

UNIT = f"{NAME}.service"


@dataclass(frozen=True)
class Status:
    """What a manager says of the service; `text` is for people."""

    text: str
    is_running: bool


class Manager(Protocol):
    """A program that keeps services running. The unit is the file that tells it of one."""

    def check(self) -> None:
        """Nothing, where this manager can be asked to change something.

        Raises:
            Unavailable: it does not run this machine.
            Forbidden: whoever asks may not.
        """

    def enable(self, unit: Path) -> None:
        """Have the unit's service run, now and after each boot (or login)."""

    def disable(self, unit: Path) -> None:
        """Stop the unit's service and forget it; returns once it has ended.

        Where the unit's file is gone, its service may be known still, or not any more.
        """

    def forget(self) -> None:
        """Take in that the unit's file is gone."""

    def status(self, unit: Path) -> Status: ...


class Systemd:
    """systemd on Linux.

    Args:
        for_user: the manager of whoever asks instead of the machine's.
        booted: is there where systemd runs the machine: sd_booted(3).
    """

    def __init__(
        self, *, for_user: bool, is_root: bool, booted: Path = Path("/run/systemd/system")
    ) -> None:
        self._for_user, self._is_root, self._booted = for_user, is_root, booted
        self._systemctl = ("systemctl", "--user") if for_user else ("systemctl",)

    def check(self) -> None:
        if not self._booted.is_dir():
            raise Unavailable(
                f"systemd does not run this machine (there is no {self._booted}): have its own "
                "service manager, or the container, run `gpustack start`"
            )
        _need_root(self._for_user or self._is_root)

    def enable(self, unit: Path) -> None:
        _run(*self._systemctl, "daemon-reload")
        _run(*self._systemctl, "enable", unit.name)
        journal = f"journalctl {'--user ' if self._for_user else ''}-u {unit.name}"
        _run(*self._systemctl, "start", unit.name, hint=f"; see `{journal}`")

    def disable(self, unit: Path) -> None:
        command = (*self._systemctl, "disable", "--now", unit.name)
        if unit.exists():
            _run(*command)
        else:  # each fails where nothing is known of it
            _asked(*self._systemctl, "stop", unit.name)
            _asked(*command)

    def forget(self) -> None:
        _run(*self._systemctl, "daemon-reload")

    def status(self, unit: Path) -> Status:
        wanted = ("ActiveState", "SubState", "MainPID", "StatusText")
        said = _run(*self._systemctl, "show", unit.name, f"--property={','.join(wanted)}")
        found = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
        state = found.get("ActiveState", "unknown")
        text = f"{state} ({found.get('SubState', '')})"
        if found.get("MainPID", "0") != "0":
            text += f", pid {found['MainPID']}"
        if words := found.get("StatusText"):
            text += f": {words}"
        return Status(text, state in {"active", "reloading"})


class Launchd:
    """launchd on macOS."""

    def __init__(self, *, for_user: bool, is_root: bool, uid: int) -> None:
        self._for_user, self._is_root = for_user, is_root
        self._domain = f"gui/{uid}" if for_user else "system"

    def check(self) -> None:
        _need_root(self._for_user or self._is_root)

    def enable(self, unit: Path) -> None:
        _run("launchctl", "enable", f"{self._domain}/{LABEL}")
        if not self._is_known():
            _run("launchctl", "bootstrap", self._domain, str(unit))

    def disable(self, unit: Path) -> None:
        if self._is_known():
            _run("launchctl", "bootout", f"{self._domain}/{LABEL}")

    def forget(self) -> None:
        pass  # bootout has done it

    def status(self, unit: Path) -> Status:
        if not self._is_known():
            return Status("not loaded", is_running=False)
        said = _run("launchctl", "print", f"{self._domain}/{LABEL}")
        pairs = (line.strip().partition(" = ") for line in reversed(said.splitlines()))
        found = {key: value for key, _, value in pairs}  # reversed: the job's own come first
        text = found.get("state", "unknown")
        if "pid" in found:
            text += f", pid {found['pid']}"
        return Status(text, found.get("state") == "running")

    def _is_known(self) -> bool:
        return _asked("launchctl", "print", f"{self._domain}/{LABEL}").returncode == 0


class WinSW:
    """Windows, through a copy of WinSW beside the unit: what it runs need not know of services."""

    def check(self) -> None:
        self._wrapper()

    def enable(self, unit: Path) -> None:
        program = unit.with_suffix(".exe")
        if not program.exists():
            shutil.copy2(self._wrapper(), program)
            _run(str(program), "install")
        _run(str(program), "start")

    def disable(self, unit: Path) -> None:
        program = unit.with_suffix(".exe")
        if not program.exists():
            return
        _asked(str(program), "stop")  # fails where it has stopped
        _run(str(program), "uninstall")
        program.unlink()

    def forget(self) -> None:
        pass

    def status(self, unit: Path) -> Status:
        said = _run(str(unit.with_suffix(".exe")), "status").strip()
        return Status(said, said.lower().startswith(("active", "started")))

    def _wrapper(self) -> str:
        for name in ("winsw", "WinSW-x64"):
            if (found := shutil.which(name)) is not None:
                return found
        raise Unavailable(
            "services on Windows need WinSW: put its program into a folder of PATH as winsw.exe"
        )


def manager(platform: str, *, for_user: bool) -> Manager:
    """The one of `platform`, as `sys.platform` has it.

    Raises:
        Unavailable: gpustack knows none there, or none for a user.
    """
    if platform == "win32":
        if for_user:
            raise Unavailable("Windows has services of the whole machine alone: leave out --user")
        return WinSW()
    uid = os.geteuid()
    if platform == "darwin":
        return Launchd(for_user=for_user, is_root=uid == 0, uid=uid)
    if platform == "linux":
        return Systemd(for_user=for_user, is_root=uid == 0)
    raise Unavailable(f"gpustack knows no service manager of {platform}")


def _need_root(holds: bool) -> None:
    if not holds:
        raise Forbidden("a service of this machine is root's to change: use sudo, or give --user")


def _run(*command: str, hint: str = "") -> str:
    """What the command prints; fails with its own last words."""
    done = _asked(*command)
    if done.returncode != 0:
        words = plain(done.stderr or done.stdout).split("\n")
        said = [line.strip() for line in words if line.strip()] or [f"status {done.returncode}"]
        raise Unavailable(f"`{' '.join(command)}` failed: {said[0]}{hint}")
    return done.stdout


def _asked(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError:
        raise NotFound(f"there is no program {command[0]} here") from None
