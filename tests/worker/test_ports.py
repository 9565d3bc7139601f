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


def test_the_port_of_an_adopted_engine_is_held() -> None:
    first = free_ports(2)
    pool = PortLeases(PortRange(first, first + 1))
    pool.hold(first)
    assert pool.lease() == first + 1
