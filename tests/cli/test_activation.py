"""Which of a node's sockets one is that a service manager gives."""

import os
import socket
from collections.abc import Callable, Iterator

import pytest

from gpustack.cli.activation import Given, assign, take
from gpustack.errors import SettingsError
from gpustack.lib.platform import listen

OPTIONS = {"public": "--port", "api": "--api-port", "worker": "--worker-port"}
Open = Callable[[str, str], Given]


@pytest.fixture
def given() -> Iterator[Open]:
    opened: list[socket.socket] = []

    def make(name: str, host: str) -> Given:
        opened.append(listen(host, 0))
        return Given(name, opened[-1])

    yield make
    for one in opened:
        one.close()


def port(one: Given) -> int:
    return one.address[1]


def test_a_name_counts_before_the_address_and_any_address_is_any(given: Open) -> None:
    named, any6, exact = given("public", "127.0.0.1"), given("", "::"), given("x", "127.0.0.1")
    wanted = {
        "public": ("0.0.0.0", port(named)),
        "worker": ("0.0.0.0", port(any6)),
        "api": ("127.0.0.1", port(exact)),
    }
    found = assign([exact, named, any6], wanted, OPTIONS)
    assert found == {"public": named.socket, "worker": any6.socket, "api": exact.socket}


def test_what_does_not_fit_is_refused_with_the_option_that_it_contradicts(given: Open) -> None:
    public, other, wide = given("public", "0.0.0.0"), given("public", "::"), given("api", "0.0.0.0")
    fits = {"public": ("0.0.0.0", port(public))}
    with pytest.raises(SettingsError, match=f"contradicts --port {port(other)}"):
        assign([public], {"public": ("0.0.0.0", port(other))}, OPTIONS)
    with pytest.raises(SettingsError, match="is the second one that is public"):
        assign([public, Given("", public.socket)], fits, OPTIONS)
    with pytest.raises(SettingsError, match=r"is open to others; api is for 127\.0\.0\.1 alone"):
        assign([wide], {"api": ("127.0.0.1", port(wide))}, OPTIONS)
    with pytest.raises(SettingsError, match="name it one of public, or give the option"):
        assign([wide], fits, OPTIONS)
    narrow = Given("", given("", "127.0.0.1").socket)
    with pytest.raises(SettingsError, match="is none that this node listens on"):
        assign([narrow], {"public": ("0.0.0.0", port(narrow))}, OPTIONS)


def test_what_is_meant_for_another_process_is_left_alone_and_unset() -> None:
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b", "HOME": "/"}
    assert take(environment) == []
    assert environment == {"HOME": "/"}


@pytest.mark.parametrize(("count", "names"), [("x", ""), ("-1", ""), ("1", "a:b"), ("", "")])
def test_variables_that_contradict_themselves_are_an_error(count: str, names: str) -> None:
    with pytest.raises(SettingsError, match="LISTEN_FD"):
        take({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count, "LISTEN_FDNAMES": names})
