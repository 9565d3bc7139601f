"""The address that a worker says is the one that it has, also when that changes."""

import asyncio
import logging
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from gpustack.config.load import load
from gpustack.config.options import Settings
from gpustack.lib.net import route_towards
from gpustack.lib.platform import listen
from gpustack.worker.address import address, first_address, keep_address
from gpustack.worker.enrolment import Enrolment, registration

LOOPBACK = "http://127.0.0.1:80"
NOWHERE = "http://nowhere.invalid"


def enrolled(tmp_path: Path, ip: str) -> Enrolment:
    said = registration(load({}, {}).settings, ip, "")
    return Enrolment(data_dir=tmp_path, server_url=LOOPBACK, join_token="", registration=said)


async def looked_at_often(settings: Settings, url: str, enrolment: Enrolment, other: Path) -> None:
    """Return when another worker, which looks less often, has found its new address."""
    changed = enrolled(other, "192.0.2.9")
    plain = load({}, {}).settings
    async with asyncio.TaskGroup() as group:
        often = group.create_task(keep_address(settings, url, enrolment, every_s=0.002))
        seldom = group.create_task(keep_address(plain, LOOPBACK, changed, every_s=0.2))
        await asyncio.wait_for(changed.news.wait(), 10)
        often.cancel()
        seldom.cancel()
    assert changed.registration.ip == "127.0.0.1"


async def test_a_changed_address_is_news_for_the_server_and_the_same_is_none(
    tmp_path: Path,
) -> None:
    enrolment = enrolled(tmp_path, "127.0.0.1")
    await looked_at_often(load({}, {}).settings, LOOPBACK, enrolment, tmp_path)
    assert not enrolment.news.is_set()


@pytest.mark.parametrize(
    ("ifname", "url", "said"),
    [
        (None, NOWHERE, ""),
        ("nope0", LOOPBACK, "keeps its address for now: --worker-ifname"),
    ],
)
async def test_while_there_is_no_address_the_last_one_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ifname: str | None, url: str, said: str
) -> None:
    enrolment = enrolled(tmp_path, "192.0.2.7")
    settings = replace(load({}, {}).settings, worker_ifname=ifname)
    with caplog.at_level(logging.WARNING):
        await looked_at_often(settings, url, enrolment, tmp_path)
    assert (enrolment.registration.ip, enrolment.news.is_set()) == ("192.0.2.7", False)
    assert caplog.text.count(said) == 1 if said else not caplog.text


async def test_an_agent_that_starts_while_the_interface_is_down_does_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = replace(load({}, {}).settings, worker_ifname="nope0")
    assert await first_address(settings, LOOPBACK) == "127.0.0.1"
    assert "network interface 'nope0' is not there" in caplog.text
    assert await first_address(settings, NOWHERE) == "127.0.0.1"


async def test_an_advertised_address_stays(tmp_path: Path) -> None:
    enrolment = enrolled(tmp_path, "192.0.2.7")
    settings = load({"advertise_address": "192.0.2.7"}, {}).settings
    async with asyncio.timeout(10):
        await keep_address(settings, LOOPBACK, enrolment, every_s=1000)


def test_the_address_is_of_the_family_that_reaches_the_server() -> None:
    settings = load({}, {}).settings
    assert address(settings, "http://[::1]:80") == "::1"
    assert address(settings, LOOPBACK) == "127.0.0.1"
    assert route_towards(NOWHERE) is None


def test_a_socket_for_all_addresses_answers_by_both_families() -> None:
    with listen("::", 0) as sock:
        port = sock.getsockname()[1]
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, port), timeout=5).close()
