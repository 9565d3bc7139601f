"""--worker-ifname: the worker says the address of that interface."""

import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from gpustack.config.load import load
from gpustack.errors import SettingsError
from gpustack.lib.net import address_of
from gpustack.worker.address import address

V4, V6, LINK = socket.AF_INET, socket.AF_INET6, 17
INTERFACES: dict[str, list[tuple[int, str]]] = {
    "eth0": [(LINK, "02:00:00:00:00:01"), (V6, "fd00::2"), (V4, "10.0.0.2"), (V4, "10.0.0.3")],
    "eth1": [(V6, "fe80::1%eth1"), (V6, "fd00::3")],
    "eth2": [(V6, "fe80::1%eth2"), (LINK, "02:00:00:00:00:02")],
    "lo": [(V4, "127.0.0.1")],
}
#: Of this machine, less what tests make and take away again.
REAL = {
    name: [one.address for one in found if one.family == V4]
    for name, found in psutil.net_if_addrs().items()
    if not name.startswith("gpu")
}


@pytest.mark.parametrize(
    ("name", "address"), [("eth0", "10.0.0.2"), ("eth1", "fd00::3"), ("lo", "127.0.0.1")]
)
def test_an_interface_is_known_by_one_of_its_addresses(name: str, address: str) -> None:
    assert address_of(name, INTERFACES) == address


@pytest.mark.parametrize(("name", "lack"), [("eth2", "has no address"), ("eth9", "is not there")])
def test_one_without_an_address_is_told_those_with_one(name: str, lack: str) -> None:
    with pytest.raises(ValueError, match=lack) as caught:
        address_of(name, INTERFACES)
    assert str(caught.value) == (
        f"network interface '{name}' {lack}; with one there are: eth0 (10.0.0.2), eth1 (fd00::3), "
        "lo (127.0.0.1)"
    )


@pytest.mark.parametrize("name", [name for name, addresses in REAL.items() if addresses])
def test_a_worker_registers_with_it(name: str) -> None:
    for url, towards in (("http://127.0.0.1", "127.0.0.1"), ("http://192.0.2.1", None)):
        assert address(load({"worker_ifname": name}, {}).settings, url) == REAL[name][0]
        plain = address(load({}, {}).settings, url)
        assert towards in (None, plain)


def test_an_advertised_address_wins_over_it() -> None:
    given = {"worker_ifname": "nope0", "advertise_address": "10.9.8.7"}
    assert address(load(given, {}).settings, "http://127.0.0.1") == "10.9.8.7"


def test_an_interface_that_is_not_there_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--worker-ifname \(environment variable GPUSTACK_W"):
        load({}, {"GPUSTACK_WORKER_IFNAME": "nope0"})
    load({"worker_ifname": "nope0", "disable_worker": True}, {})  # nobody would say it
    done = subprocess.run(
        [sys.executable, "-m", "gpustack", "start", "--worker-ifname", "nope0",
         "--data-dir", str(tmp_path / "data")],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: --worker-ifname: network interface 'nope0' is not there; with")
    assert not (tmp_path / "data").exists()


def test_one_that_vanished_since_is_said_in_one_sentence() -> None:
    settings = replace(load({}, {}).settings, worker_ifname="nope0")
    with pytest.raises(SettingsError, match=r"^--worker-ifname: network interface 'nope0' is not"):
        address(settings, "http://127.0.0.1")
