"""Build `Settings`: command line over environment over YAML file over default."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpustack.config import values
from gpustack.config.options import Option, Settings, defaults, options
from gpustack.errors import SettingsError
from gpustack.lib.platform import default_data_dir
from gpustack.lib.secrets import Secret


def load(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
    """The effective settings.

    Args:
        flags: what the command line gave, by key; an absent key was not given.
        environment: of the process.

    Raises:
        SettingsError: names the option, where the value came from and what would be right.
    """
    table = {known.key: known for known in options()}
    given: dict[str, Any] = {}
    config_file = _told(table["config_file"], flags, environment)
    if config_file is not None:
        given |= _read_file(config_file, table)
    for known in table.values():
        if (value := _told(known, flags, environment)) is not None:
            given[known.key] = value
    settings = _completed(given)
    _check(settings)
    return settings


def from_json(raw: Mapping[str, Any]) -> Settings:
    """The settings that `to_json` wrote."""
    table = {known.key: known for known in options()}
    parsed: dict[str, Any] = {
        key: None if value is None else values.parse(table[key].kind, value)
        for key, value in raw.items()
    }
    return Settings(**parsed)


def to_json(settings: Settings) -> dict[str, Any]:
    """For a role's pipe: secrets are in it."""
    return {known.key: values.to_json(getattr(settings, known.key)) for known in options()}


def _told(known: Option, flags: Mapping[str, Any], environment: Mapping[str, str]) -> Any:
    """What the command line or else the environment says of an option; None: nothing.

    A variable that is set to nothing is not set.
    """
    if known.key in flags:
        return _parsed(known, flags[known.key], f"option {known.flag}")
    for name in known.environment:
        if environment.get(name):
            return _parsed(known, environment[name], f"environment variable {name}")
    return None


def _parsed(known: Option, raw: Any, origin: str) -> Any:
    try:
        return values.parse(known.kind, raw)
    except ValueError as error:
        # The parser quotes what it got; a secret must not be.
        why = "want text that is not empty" if known.kind == "secret" else error
        raise SettingsError(f"{origin}: {why}") from None


def _read_file(path: Path, table: Mapping[str, Option]) -> dict[str, Any]:
    import yaml  # only where there is a file

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise SettingsError(f"cannot read config file {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"config file {path} is not YAML: {_problem(error)}") from None
    except (ValueError, RecursionError):  # no UTF-8, no such date, digits or brackets without end
        raise SettingsError(f"config file {path} is not YAML text in UTF-8") from None
    if not isinstance(content, dict):
        raise SettingsError(f"config file {path}: want `option: value` lines")
    found = {}
    for key, raw in content.items():
        known = table.get(str(key).replace("-", "_"))
        if known is None:
            near = difflib.get_close_matches(str(key), table, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            name = str(key)[: values.SHOWN]
            raise SettingsError(f"config file {path}: unknown key {name}{hint}")
        if raw is not None:
            found[known.key] = _parsed(known, raw, f"config file {path}, key {key}")
    return found


def _problem(error: Exception) -> str:
    """What is wrong where, without the file's text: a secret may stand there."""
    # Quoted are single characters, <kinds of token>, and names out of the file.
    problem = getattr(error, "problem", None) or "a character that YAML forbids"
    problem = re.sub(r"'[^'<].+'", "'...'", problem)
    mark = getattr(error, "problem_mark", None)
    return f"{problem} at {mark.line + 1}:{mark.column + 1}" if mark else problem


def _completed(given: dict[str, Any]) -> Settings:
    """Defaults that depend on other options."""
    full = defaults() | given
    data_dir = full["data_dir"] or default_data_dir()
    derived = {
        "data_dir": data_dir,
        "cache_dir": data_dir / "cache",
        "bin_dir": data_dir / "bin",
        "log_dir": data_dir / "log",
        "database_url": Secret(f"sqlite:///{data_dir / 'database.db'}"),
    }
    return Settings(**full | {k: v for k, v in derived.items() if full[k] is None})


def _check(settings: Settings) -> None:
    """Contradictions between options.

    Raises:
        SettingsError: names both and says what would be right.
    """
    ports = {"--worker-port": settings.worker_port} if settings.has_worker else {}
    if settings.is_server:
        ports |= {"--port": settings.port, "--api-port": settings.api_port}
    for flag, port in ports.items():
        clash = next((f for f, p in ports.items() if p == port and f != flag), None)
        if clash:
            raise SettingsError(f"{flag} and {clash} are both {port}: give one of them another")
        pool = settings.service_port_range
        if settings.has_worker and pool.first <= port <= pool.last:
            raise SettingsError(
                f"{flag} {port} lies in --service-port-range {pool}: move one of them"
            )
    for label in settings.worker_labels:
        if not label.partition("=")[0] or "=" not in label:
            raise SettingsError(f"--worker-labels: want key=value, got {values.shown(label)}")
    if not settings.is_server and settings.token is None:
        raise SettingsError(
            "--server-url needs --token: the content of <data-dir>/token on the server"
        )
    url = settings.database_url.reveal()
    if not url.startswith("sqlite:///"):
        scheme, separator, _ = url.partition("://")  # without one, all of it may be secret
        got = f", got scheme {values.shown(scheme)}" if separator else ""
        raise SettingsError(f"--database-url: want sqlite:///PATH{got}")
