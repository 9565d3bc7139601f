"""`gpustack reload-config`: new settings for a running node, if possible without a restart.

The command leaves a request in the data directory, signals the launcher and reads its answer:
both files are their owner's alone, so whoever may ask may also change the config file.
"""

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from gpustack.cli.here import here, node_on, place
from gpustack.config.options import Settings, defaults, options
from gpustack.errors import SettingsError
from gpustack.lib import platform
from gpustack.lib.platform import write_private
from gpustack.lib.secrets import new_secret

REQUEST, ANSWER = "reload.json", "reloaded.json"
#: Held by whoever asks: there is one request and one answer at a time.
TURN = "reload.lock"
TIMEOUT_S = 30.0
HOT = frozenset(known.key for known in options() if known.hot)


@dataclass(frozen=True)
class Answer:
    """What became of a request.

    Attributes:
        changed: keys whose new value is in effect.
        waiting: keys whose new value needs `gpustack restart`.
        problem: why nothing was changed.
    """

    changed: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    problem: str = ""


def taken_in(current: Settings, fresh: Settings) -> tuple[Settings, Answer]:
    """PURE: `current` with what a running node can take of `fresh`, and what that was."""
    changed = [key for key in defaults() if getattr(current, key) != getattr(fresh, key)]
    hot = {key: getattr(fresh, key) for key in changed if key in HOT}
    return replace(current, **hot), Answer([*hot], [key for key in changed if key not in HOT])


def request(data_dir: Path) -> tuple[str, dict[str, Any]]:
    """Who asks, and the values that were asked for; nothing where a bare signal came.

    A value of None: what was asked for earlier is no more. A request is taken once, whatever it is.

    Raises:
        SettingsError: it is none that `gpustack reload-config` writes.
    """
    path = data_dir / REQUEST
    try:
        taken = path.replace(path.with_suffix(".taken"))  # away, before anything in it is judged
        raw = taken.read_bytes()
        taken.unlink()
        asked = json.loads(raw)
        return str(asked["id"]), dict(asked["set"])
    except FileNotFoundError:
        return "", {}
    except (OSError, ValueError, KeyError, TypeError):
        raise SettingsError(f"{path} is not what `gpustack reload-config` writes") from None


def answer(data_dir: Path, who: str, said: Answer) -> None:
    write_private(data_dir / ANSWER, json.dumps({"id": who, **asdict(said)}))


@click.command(name="reload-config")
@click.option(
    "--set",
    "given",
    multiple=True,
    metavar="KEY=VALUE",
    help="A value that lasts until the node restarts; repeatable.",
)
@click.option(
    "--unset",
    "dropped",
    multiple=True,
    metavar="KEY",
    help="A key whose value of --set lasts no longer; repeatable.",
)
@click.option("--list", "show", is_flag=True, help="Say which keys need no restart, and end.")
@here
def reload_config(
    given: tuple[str, ...], dropped: tuple[str, ...], show: bool, **which: str | None
) -> None:
    """Have the running node read its config file again; say what is in effect, what waits."""
    if show:
        click.echo("\n".join(sorted(HOT)))
        return
    said = _ask(place(which), _parsed(given, dropped))
    if said.problem:
        raise SettingsError(f"nothing was changed: {said.problem}")
    click.echo(f"in effect: {', '.join(said.changed) or 'nothing new'}")
    if said.waiting:
        click.echo(f"needs `gpustack restart`: {', '.join(said.waiting)}")


def _parsed(given: tuple[str, ...], dropped: tuple[str, ...]) -> dict[str, str | None]:
    values: dict[str, str | None] = {}
    for pair in given:
        key, separator, value = pair.partition("=")
        if not separator:
            raise SettingsError(f"--set: want KEY=VALUE, got {pair}")
        values[_hot("--set", key)] = value
    for name in dropped:
        key = _hot("--unset", name)
        if key in values:
            raise SettingsError(f"--unset: {key} is in --set as well")
        values[key] = None
    return values


def _hot(option: str, name: str) -> str:
    """The key that `name` is."""
    key = name.replace("-", "_")
    if key not in HOT:
        known = key in defaults()
        why = "needs a restart: change it where the node gets it" if known else "is no option"
        raise SettingsError(f"{option}: {key} {why}; without one: {', '.join(sorted(HOT))}")
    return key


def _ask(data_dir: Path, values: Mapping[str, str | None]) -> Answer:
    deadline = time.monotonic() + TIMEOUT_S
    node_on(data_dir)  # before anything is made there
    with _turn(data_dir, deadline):
        pid = node_on(data_dir)["pid"]  # it may have ended while we waited
        try:
            return _answered(data_dir, pid, values, deadline)
        finally:
            (data_dir / REQUEST).unlink(missing_ok=True)  # nobody waits for it any more


@contextmanager
def _turn(data_dir: Path, deadline: float) -> Iterator[None]:
    """While nobody else asks."""
    fd = os.open(data_dir / TURN, os.O_RDWR | os.O_CREAT, 0o600)
    with os.fdopen(fd, "r+b", buffering=0) as file:
        while not platform.lock(file):
            if time.monotonic() > deadline:
                raise SettingsError(
                    f"another `gpustack reload-config` has waited for {TIMEOUT_S:g} s; "
                    "see the node's log"
                )
            time.sleep(0.02)
        yield


def _answered(
    data_dir: Path, pid: int, values: Mapping[str, str | None], deadline: float
) -> Answer:
    who = new_secret()
    write_private(data_dir / REQUEST, json.dumps({"id": who, "set": values}))
    os.kill(pid, signal.SIGHUP)
    while time.monotonic() < deadline:
        try:
            said = json.loads((data_dir / ANSWER).read_text())
        except FileNotFoundError:
            said = {}
        if said.pop("id", None) == who:
            return Answer(**said)
        time.sleep(0.02)
    raise SettingsError(f"pid {pid} has not answered within {TIMEOUT_S:g} s; see its log")
