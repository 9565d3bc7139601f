import socket

import pytest

from gpustack.config.options import PortRange
from gpustack.errors import Unavailable
from gpustack.worker.ports import PortLeases
from tests.support.ports import free_ports


def leases(count: int) -> PortLeases:
    first = free_ports(count)
    return PortLeases(PortRange(first, first + count - 1))


def test_no_port_is_leased_twice_until_it_is_back() -> None:
    pool = leases(4)
    ports = [pool.lease() for _ in range(4)]
    assert len(set(ports)) == 4
    with pytest.raises(Unavailable, match="--service-port-range"):
        pool.lease()
    pool.release(ports[2])
    assert pool.lease() == ports[2]


def test_a_port_rests_before_it_is_used_again() -> None:
    pool = leases(3)
    first = pool.lease()
    pool.release(first)
    assert pool.lease() != first


def test_a_port_that_something_listens_on_is_not_leased() -> None:
    first = free_ports(2)
    pool = PortLeases(PortRange(first, first + 1))
    with socket.create_server(("127.0.0.1", first)):
        assert pool.lease() == first + 1
        with pytest.raises(Unavailable):
            pool.lease()
    assert pool.lease() == first


def test_a_port_that_something_listens_on_everywhere_is_not_leased() -> None:
    first = free_ports(2)
    pool = PortLeases(PortRange(first, first + 1))
    with socket.create_server(("0.0.0.0", first)):
        assert pool.lease() == first + 1


def test_a_port_that_something_listens_on_by_ipv6_for_both_is_not_leased() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    first = free_ports(2)
    pool = PortLeases(PortRange(first, first + 1))
    with socket.create_server(("::", first), family=socket.AF_INET6, dualstack_ipv6=True):
        assert pool.lease() == first + 1


def test_connections_that_have_ended_do_not_keep_a_port() -> None:
    first = free_ports(1)
    pool = PortLeases(PortRange(first, first))
    with socket.create_server(("127.0.0.1", first)) as server:
        client = socket.create_connection(("127.0.0.1", first))
        accepted, _ = server.accept()
        accepted.close()  # the side that closes first waits: TIME_WAIT
        client.close()
    with socket.socket() as strict, pytest.raises(OSError, match="in use"):
        strict.bind(("127.0.0.1", first))
    assert pool.lease() == first


def test_what_the_message_counts_is_true() -> None:
    first = free_ports(3)
    pool = PortLeases(PortRange(first, first + 2))
    pool.hold(first - 1)  # of a range that was another before
    pool.lease()
    with (
        socket.create_server(("127.0.0.1", first + 1)),
        socket.create_server(("127.0.0.1", first + 2)),
        pytest.raises(Unavailable, match=r"1 of 3 are held by engines .*, 2 by other programs;"),
    ):
        pool.lease()
    pool.lease(), pool.lease()
    with pytest.raises(Unavailable, match="3 of 3 are held by engines of this worker; widen"):
        pool.lease()


def test_a_port_that_two_hold_is_free_when_both_are_gone() -> None:
    first = free_ports(1)
    pool = PortLeases(PortRange(first, first))
    pool.hold(first)
    pool.hold(first)
    pool.release(first)
    with pytest.raises(Unavailable):
        pool.lease()
    pool.release(first)
    assert pool.lease() == first


def test_the_port_of_an_adopted_engine_is_held() -> None:
    first = free_ports(2)
    pool = PortLeases(PortRange(first, first + 1))
    pool.hold(first)
    assert pool.lease() == first + 1
