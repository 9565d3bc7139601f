"""Build `Settings`: command line over environment over YAML file over default."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gpustack.config import checks, file, values
from gpustack.config.option import Option
from gpustack.config.options import FILE_KEYS, WAITING, Settings, defaults, options
from gpustack.errors import SettingsError
from gpustack.lib.platform import default_data_dir
from gpustack.lib.secrets import Secret

#: Where a value comes from that nobody gave.
DEFAULT = "default"


@dataclass(frozen=True)
class Loaded:
    """Settings, and what is worth saying of them.

    Attributes:
        origins: by key, for what was given: the flag, variable, or file and line.
        warnings: sentences on what works and should be written otherwise, or does not work yet.
    """

    settings: Settings
    origins: Mapping[str, str]
    warnings: tuple[str, ...]


def load(
    flags: Mapping[str, Any],
    environment: Mapping[str, str],
    overrides: Mapping[str, Any] = MappingProxyType({}),
) -> Loaded:
    """The effective settings.

    Args:
        flags: what the command line gave, by key; an absent key was not given.
        environment: of the process.
        overrides: what the running node was told later; they win.

    Raises:
        SettingsError: a line for each mistake; it names the option, where the value came from
            and what would be right.
    """
    given = _Given({known.key: known for known in options()})
    given.read(flags, environment, overrides)
    given.replace_older_names()
    settings = _completed(given.found)
    problems = given.problems or [
        *checks.contradictions(settings, given.origins),
        *checks.unusable(settings, given.origins),
    ]
    if problems:
        raise SettingsError("\n".join(problems))
    given.warn_of_what_waits()
    return Loaded(settings, given.origins, tuple(given.warnings))


def data_dir(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Path:
    """The state directory of the node that is started so; no other option is looked at.

    Raises:
        SettingsError: they name none, or the config file that might cannot be read.
    """
    given = _Given({known.key: known for known in options()})
    given.read_place(flags, environment)
    if given.problems:
        raise SettingsError("\n".join(given.problems))
    return Path(given.found.get("data_dir") or default_data_dir())


class _Given:
    """What was given, and by whom."""

    def __init__(self, table: Mapping[str, Option]) -> None:
        self._table = table
        self.found: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.warnings: list[str] = []
        self.problems: list[str] = []

    def read(
        self,
        flags: Mapping[str, Any],
        environment: Mapping[str, str],
        overrides: Mapping[str, Any],
    ) -> None:
        told = {key: self._told(known, flags, environment) for key, known in self._table.items()}
        if config_file := told["config_file"]:
            self._take("config_file", *config_file)
            if path := self.found.get("config_file"):
                self._read_file(path)
        for key, said in told.items():
            if said is not None and key != "config_file":
                self._take(key, *said)
        for key, raw in overrides.items():
            self._take(key, raw, f"reload-config, key {key}")

    def read_place(self, flags: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        """The data directory alone, where it is named first."""
        for key in ("data_dir", "config_file"):
            said = self._told(self._table[key], flags, environment)
            if said is None:
                continue
            self._take(key, *said)
            if key == "data_dir":
                return
        if path := self.found.get("config_file"):
            content = file.read(path, self._table.keys() | FILE_KEYS, {"data_dir"})
            if line := content.lines.get("data_dir"):
                self._take("data_dir", line.value, line.origin)

    def _told(
        self, known: Option, flags: Mapping[str, Any], environment: Mapping[str, str]
    ) -> tuple[Any, str] | None:
        """What the command line or else the environment says of an option; None: nothing.

        A variable that is set to nothing is not set.
        """
        if known.key in flags:
            return flags[known.key], f"option {known.flag}"
        for name in known.environment:
            if environment.get(name):
                return environment[name], f"environment variable {name}"
        return None

    def _read_file(self, path: Any) -> None:
        try:
            known = {*self._table, *FILE_KEYS} - {"config_file"}
            texts = {key for key, option in self._table.items() if not option.is_structured}
            content = file.read(path, known, texts)
        except SettingsError as error:
            self.problems.append(str(error))
            return
        self.problems += content.problems
        for key, line in content.lines.items():
            self._take(key, line.value, line.origin)

    def _take(self, key: str, raw: Any, origin: str) -> None:
        known = self._table.get(key)
        kind = known.kind if known else "json"
        try:
            value = values.parse(kind, raw)
            if known and known.choices and value not in known.choices:
                wanted = ", ".join(known.choices)
                raise ValueError(f"want one of {wanted}, got {values.shown(raw)}")  # noqa: TRY301
        except ValueError as error:
            # The parser quotes what it got; a secret must not be.
            why = "want text that is not empty" if kind == "secret" else error
            self.problems.append(f"{origin}: {why}")
            return
        self.found[key], self.origins[key] = value, origin
        self.warnings += [f"{origin}: {word}" for word in values.outdated(kind, raw)]

    def replace_older_names(self) -> None:
        """Move what came under an older name to the newer one, unless that was given too."""
        for key, known in self._table.items():
            if known.deprecated and key in self.found:
                newer = known.deprecated[2:].replace("-", "_")
                self.warnings.append(f"{self.origins[key]}: deprecated, use {known.deprecated}")
                self._move(key, newer)
        if "server_url" in self.found:
            # A worker alone has metrics of one kind; a config file of v0.6 gave them these names.
            self._move("metrics_port", "worker_metrics_port")
            self._move("disable_metrics", "disable_worker_metrics")

    def _move(self, older: str, newer: str) -> None:
        value, origin = self.found.pop(older, None), self.origins.pop(older, "")
        if value is not None and newer not in self.found:
            self.found[newer], self.origins[newer] = value, origin

    def warn_of_what_waits(self) -> None:
        unset = defaults()
        for key in sorted(WAITING & self.found.keys()):
            if self.found[key] != unset[key]:
                self.warnings.append(f"{self.origins[key]}: has no effect in this version yet")


def from_json(raw: Mapping[str, Any]) -> Settings:
    """The settings that `to_json` wrote."""
    kinds = {known.key: known.kind for known in options()}
    parsed: dict[str, Any] = {
        key: None if value is None else values.parse(kinds.get(key, "json"), value)
        for key, value in raw.items()
    }
    return Settings(**parsed)


def to_json(settings: Settings) -> dict[str, Any]:
    """For a role's pipe: secrets are in it."""
    return {key: values.to_json(getattr(settings, key)) for key in defaults()}


def hot_json(settings: Settings) -> dict[str, Any]:
    """What a running node may change of `settings`. No secret is among it."""
    return {
        known.key: values.to_json(getattr(settings, known.key)) for known in options() if known.hot
    }


def with_hot(settings: Settings, raw: Mapping[str, Any]) -> Settings:
    """`settings` with what `hot_json` wrote of others."""
    kinds = {known.key: known.kind for known in options()}
    parsed = {key: values.parse(kinds[key], value) for key, value in raw.items()}
    return replace(settings, **parsed)


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
