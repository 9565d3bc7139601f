"""Several hosts on one machine: network namespaces on a bridge of their own.

Needs root and iproute2. The machine itself is the last address of the network.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from tests.support.ports import PROCESS

#: Each of the processes that run tests at the same time has names and a network of its own.
NETWORK = f"10.{90 + PROCESS}.0"
NETWORK_V6 = f"fd00:{90 + PROCESS}"
BRIDGE = f"gpubr{PROCESS}"


@dataclass(frozen=True)
class Host:
    """One namespace. `command` runs a program in it."""

    name: str
    address: str
    link: str

    @property
    def command(self) -> list[str]:
        return ["ip", "netns", "exec", self.name]

    def ip(self, *words: str) -> None:
        """Run iproute2's `ip` on it."""
        _ip("-n", self.name, *words)

    def cut(self) -> None:
        """Take its cable out."""
        _ip("link", "set", self.link, "down")

    def heal(self) -> None:
        _ip("link", "set", self.link, "up")


def lacking() -> str | None:
    """What this machine lacks for hosts, and how to get it; None: nothing."""
    if shutil.which("ip") is None:
        return "hosts need iproute2: apt-get install iproute2"
    if os.geteuid() != 0:
        return "hosts need root: run as root, or under `unshare -Urn`"
    return None


@contextlib.contextmanager
def hosts(count: int, *, v6: bool = False) -> Iterator[list[Host]]:
    """`count` hosts that reach each other and this machine; gone afterwards.

    Args:
        v6: they have IPv6 addresses alone.
    """
    start, mask = (f"{NETWORK_V6}::", "/64") if v6 else (f"{NETWORK}.", "/24")
    # Without duplicate address detection, which would take a second before each can be used.
    more = ("nodad",) if v6 else ()
    made = [
        Host(f"gpuhost{PROCESS}{number}", f"{start}{number}", f"gpuveth{PROCESS}{number}")
        for number in range(1, count + 1)
    ]
    _remove(made)
    try:
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{start}254{mask}", "dev", BRIDGE, *more)
        _ip("link", "set", BRIDGE, "up")
        for host in made:
            _ip("netns", "add", host.name)
            _ip(
                *("link", "add", host.link, "type", "veth"),
                *("peer", "name", "eth0", "netns", host.name),
            )
            _ip("link", "set", host.link, "master", BRIDGE, "up")
            host.ip("addr", "add", f"{host.address}{mask}", "dev", "eth0", *more)
            host.ip("link", "set", "eth0", "up")
            host.ip("link", "set", "lo", "up")
        yield made
    finally:
        _remove(made)


def _remove(made: list[Host]) -> None:
    for host in made:
        subprocess.run(["ip", "netns", "del", host.name], capture_output=True, check=False)
        # While a process lives in there, the cable stays too.
        subprocess.run(["ip", "link", "del", host.link], capture_output=True, check=False)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
