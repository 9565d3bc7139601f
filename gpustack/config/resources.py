"""The block `resources:` of a config file: what a worker has, said instead of found out."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from gpustack.config.option import Json
from gpustack.lib.units import GIB, KIB, MIB

#: Platform of a vendor's devices where none is given: what schedulers and engines call it.
_TYPES: Final = {
    "nvidia": "cuda",
    "amd": "rocm",
    "ascend": "cann",
    "huawei": "cann",
    "hygon": "dcu",
    "moore threads": "musa",
    "mthreads": "musa",
    "iluvatar": "corex",
    "cambricon": "mlu",
    "apple": "mps",
}

_UNITS: Final = {"KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 1024 * GIB}

#: 1 PiB: more is a slip of the keyboard.
_MOST: Final = 1 << 50

_TEXTS = (
    "name",
    "vendor",
    "type",
    "uuid",
    "parent_uuid",
    "driver_version",
    "runtime_version",
    "architecture",
    "compute_capability",
)
#: GPUStack 0.x has these too; they say nothing that is used.
_UNUSED_OF_DEVICE = {"device_index", "device_chip_index", "core", "temperature", "labels"}
_UNUSED = {"swap", "filesystem", "os", "kernel", "uptime"}

#: Our name -> the one of GPUStack 0.x.
_NETWORK: Final = {
    "status": "status",
    "ip": "inet",
    "netmask": "netmask",
    "mac": "mac",
    "gateway": "gateway",
    "interface": "iface",
    "mtu": "mtu",
}


@dataclass(frozen=True, slots=True)
class Resources:
    """What was said; None: it is to be found out.

    Attributes:
        devices: each as the API shows a device.
    """

    devices: tuple[Mapping[str, Any], ...] | None = None
    cpu_count: int | None = None
    memory_total_bytes: int | None = None


@dataclass
class _Reader:
    """Reads what somebody wrote; each mistake is a sentence that begins with its place."""

    problems: list[str] = field(default_factory=list)

    def wrong(self, place: str, sentence: str) -> None:
        self.problems.append(f"{place}: {sentence}")

    def resources(self, raw: Json) -> Resources:
        place = "resources"
        self.keys(
            raw, place, {"gpu_devices", "cpu_count", "memory_total_bytes", "cpu", "memory"}, _UNUSED
        )
        devices = raw.get("gpu_devices")
        cpu, cpu_place = _either(raw, place, "cpu_count", "cpu")
        memory, memory_place = _either(raw, place, "memory_total_bytes", "memory")
        return Resources(
            devices=None if devices is None else self.devices(devices, f"{place}.gpu_devices"),
            cpu_count=None if cpu is None else self.number(cpu, cpu_place, least=1, most=1 << 16),
            memory_total_bytes=None if memory is None else self.size(memory, memory_place),
        )

    def devices(self, raw: Any, place: str) -> tuple[Mapping[str, Any], ...]:
        if not isinstance(raw, list | tuple):
            self.wrong(place, "want a list of devices; an empty one: there are none")
            return ()
        devices = [self.device(each, f"{place}[{at}]", at) for at, each in enumerate(raw)]
        first: dict[object, int] = {}
        for at, device in enumerate(devices):
            key = device.get("type"), device.get("index")
            if (before := first.setdefault(key, at)) != at:
                self.wrong(
                    f"{place}[{at}].index",
                    f"{key[1]} of type {key[0]} is {place}[{before}] already: want another",
                )
        return tuple(devices)

    def device(self, raw: Any, place: str, at: int) -> dict[str, Any]:
        if not isinstance(raw, Mapping):
            self.wrong(place, "want keys and values, such as vendor and memory_total_bytes")
            return {"index": -1 - at}
        known = {*_TEXTS, "index", "memory_total_bytes", "memory_unified", "memory", "network"}
        self.keys(raw, place, known, _UNUSED_OF_DEVICE)
        index = raw.get("index", raw.get("device_index", at))
        memory, memory_place = _either(raw, place, "memory_total_bytes", "memory")
        older = raw.get("memory") if isinstance(raw.get("memory"), Mapping) else {}
        unified = raw.get("memory_unified", (older or {}).get("is_unified_memory", False))
        device: dict[str, Any] = {
            name: self.text(raw[name], f"{place}.{name}") for name in _TEXTS if name in raw
        }
        device["index"] = self.number(index, f"{place}.index", least=0, most=1 << 16)
        device["memory_total_bytes"] = self.size(memory, memory_place)
        device["memory_unified"] = self.truth(unified, f"{place}.memory_unified")
        vendor = device.setdefault("vendor", "")
        if not vendor:
            self.wrong(f"{place}.vendor", "want the vendor's name, such as NVIDIA")
        elif not device.get("type"):
            device["type"] = _TYPES.get(vendor.lower(), "")
            if not device["type"]:
                self.wrong(
                    f"{place}.type",
                    f"want the platform of {vendor}'s devices, such as cuda or cann",
                )
        if raw.get("network") is not None:
            device["network"] = self.network(raw["network"], f"{place}.network")
        return device

    def network(self, raw: Any, place: str) -> dict[str, Any]:
        if not isinstance(raw, Mapping):
            self.wrong(place, "want keys and values, such as ip and netmask")
            return {}
        self.keys(raw, place, set(_NETWORK), set(_NETWORK.values()))
        found: dict[str, Any] = {}
        for name, older in _NETWORK.items():
            value = raw.get(name, raw.get(older))
            if value is None:
                continue
            where = f"{place}.{name}"
            if name == "mtu":
                found[name] = self.number(value, where, least=1, most=1 << 16)
            else:
                found[name] = self.text(value, where)
        return found

    def keys(self, raw: Json, place: str, known: set[str], unused: set[str]) -> None:
        for key in raw:
            if key not in known | unused:
                wanted = ", ".join(sorted(known))
                self.wrong(f"{place}.{key}", f"there is no such key: want one of {wanted}")

    def text(self, raw: Any, place: str) -> str:
        if isinstance(raw, str) and len(raw) <= 200 and raw.isprintable():
            return raw
        # YAML takes 9.0 for a number: 9.10 would have become 9.1.
        self.wrong(place, "want one line of text; in quotes, if it looks like a number")
        return ""

    def number(self, raw: Any, place: str, *, least: int, most: int) -> int:
        if isinstance(raw, int) and not isinstance(raw, bool) and least <= raw <= most:
            return raw
        self.wrong(place, f"want a whole number from {least} to {most}, got {_shown(raw)}")
        return least

    def truth(self, raw: Any, place: str) -> bool:
        if isinstance(raw, bool):
            return raw
        self.wrong(place, f"want true or false, got {_shown(raw)}")
        return False

    def size(self, raw: Any, place: str) -> int:
        size = _bytes(raw)
        if size is not None and 0 < size < _MOST:
            return size
        self.wrong(place, f"want bytes, such as 85899345920 or 80GiB, got {_shown(raw)}")
        return 1


def read(raw: Json) -> Resources:
    """What the block says.

    Raises:
        ValueError: it says what cannot be; a line for each mistake, with its place in the block.
    """
    reader = _Reader()
    resources = reader.resources(raw)
    if reader.problems:
        raise ValueError("\n".join(reader.problems))
    return resources


def _either(raw: Json, place: str, name: str, older: str) -> tuple[Any, str]:
    """A value by our name, or in the shape of GPUStack 0.x, `memory: {total: …}`; and its place."""
    if name not in raw and older in raw:
        inner = raw[older]
        if isinstance(inner, Mapping):
            return inner.get("total"), f"{place}.{older}.total"
        return inner, f"{place}.{older}"
    return raw.get(name), f"{place}.{name}"


def _bytes(raw: Any) -> int | None:
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and (parts := re.fullmatch(r"(\d{1,9}) ?([KMGT]iB)", raw)):
        return int(parts[1]) * _UNITS[parts[2]]
    return None


def _shown(raw: Any) -> str:
    return "nothing" if raw is None else repr(raw)[:60]
