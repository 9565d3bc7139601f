"""What an option is: how it is spelled, what it may be, what it means."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Text(NamedTuple):
    """The same sentence in the languages of our documents."""

    en: str
    zh: str


class PortRange(NamedTuple):
    """Ports first..last, both included."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


class Reserved(NamedTuple):
    """GiB kept back from scheduling on each worker (ram) and on each GPU (vram)."""

    ram: float
    vram: float


#: A JSON object out of an option. Read-only, as all settings are.
Json = Mapping[str, Any]

#: What stands for the value in help; TEXT where a kind is not named.
METAVARS = {
    "count": "NUMBER",
    "port": "PORT",
    "ports": "FIRST-LAST",
    "path": "PATH",
    "url": "URL",
    "database": "URL",
    "host": "ADDRESS",
    "duration": "TIME",
    "json": "JSON",
    "reserved": "JSON",
    "list": "ITEM",
    "labels": "ITEM",
    "networks": "ITEM",
    "origins": "ITEM",
    "tokens": "ITEM",
    "arguments": "ITEM",
}

GENERATED = Text("generated", "自动生成")
DETECTED = Text("detected", "自动检测")


@dataclass(frozen=True)
class Option:
    """How one field of `Settings` is spelled and explained.

    Attributes:
        flag: long option; the field's name, with dashes.
        kind: which parser of `values` reads it.
        group: heading in help and documents: common, server or worker.
        env: further variables that set it.
        choices: all that it may be; empty: whatever its kind allows.
        shown_default: what help says where the default is not a plain value.
        deprecated: the option that replaces this one.
        hidden: secrets may stand in it though its kind is not one.
        hot: a running node takes a new value without a restart.
    """

    flag: str
    kind: str
    group: str
    meaning: Text
    aliases: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    shown_default: Text | None = None
    deprecated: str | None = None
    hidden: bool = False
    hot: bool = False

    @property
    def key(self) -> str:
        """The name in YAML and in `Settings`."""
        return self.flag[2:].replace("-", "_")

    @property
    def environment(self) -> tuple[str, ...]:
        """Variables that set it, the first that is set wins."""
        return (f"GPUSTACK_{self.key.upper()}", *self.env)

    def aliases_on(self, platform: str) -> tuple[str, ...]:
        """Its other spellings there: PowerShell has -d for itself."""
        return tuple(alias for alias in self.aliases if (platform, alias) != ("win32", "-d"))

    def usage(self, platform: str) -> str:
        """How it is written on the command line there."""
        names = ", ".join((*self.aliases_on(platform), self.flag))
        return names if self.kind == "bool" else f"{names} {METAVARS.get(self.kind, 'TEXT')}"

    @property
    def repeatable(self) -> bool:
        return METAVARS.get(self.kind) == "ITEM"

    @property
    def is_structured(self) -> bool:
        """Whether it is more than one word: a list or an object."""
        return METAVARS.get(self.kind) in {"ITEM", "JSON"}

    @property
    def secret(self) -> bool:
        """Whether its value must not be shown."""
        return self.hidden or self.kind in {"secret", "database"}


class Group:
    """Declares the options of one heading, as fields of a dataclass."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, flag: str, kind: str, default: Any, en: str, zh: str, **more: Any) -> Any:
        known = Option(flag, kind, self._name, Text(en, zh), **more)
        return field(default=default, metadata={"option": known})
