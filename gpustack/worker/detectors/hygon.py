"""Hygon: hy-smi, which takes rocm-smi's arguments and prints rocm-smi's JSON in words of its own.

`index` is the number in "card0", which HIP_VISIBLE_DEVICES counts. The architecture (gfx928,
gfx936) is not in it: it stays empty.

Sources: reports gpustack/gpustack 2032 and 3257, hy-smi's input plugin of categraf.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gpustack.schemas.workers import Device
from gpustack.worker.detectors.reading import (
    celsius,
    checked,
    inside,
    json_of,
    no_memory,
    percent,
    program,
    size,
    text,
    watts,
)
from gpustack.worker.detectors.runtimes import completed
from gpustack.worker.detectors.tools import Tools

_ARGUMENTS: Final = (
    "--showid",
    "--showmeminfo",
    "vram",
    "--showpower",
    "--showserial",
    "--showuse",
    "--showtemp",
    "--showproductname",
    "--showuniqueid",
    "--showdriverversion",
    "--json",
)

_PLACES: Final = ("hy-smi", "/opt/hyhal/bin/hy-smi", "/usr/local/hyhal/bin/hy-smi")


class Hygon:
    vendor = "Hygon"

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def look(self, tools: Tools) -> list[Device]:
        name = program(tools, *_PLACES)
        if name is None:
            return []
        return completed(parse(tools.run(name, *_ARGUMENTS)), self._root)


def parse(output: str) -> list[Device]:
    """Devices from hy-smi's JSON.

    Raises:
        ValueError: it is no such output.
    """
    cards = json_of(output, "hy-smi")
    if not isinstance(cards, dict):
        raise ValueError("hy-smi printed a list, not the cards by name")
    driver = text(inside(cards, "system", "Driver version"))
    found: list[tuple[int, Mapping[str, Any]]] = []
    for name, card in cards.items():
        place = re.fullmatch(r"card(\d{1,4})", name)
        if place is None:
            continue
        if not isinstance(card, dict):
            raise ValueError(f"hy-smi printed {name} without its values")
        values = {key.strip().lower(): value for key, value in card.items()}
        found.append((int(place[1]), values))
    if not found:
        raise ValueError("hy-smi printed no card")
    return checked((_device(index, values, driver) for index, values in found), "hy-smi")


def _device(index: int, values: Mapping[str, Any], driver: str) -> Device:
    total = _memory(values, "vram total memory")
    return Device(
        index=index,
        name=text(values.get("card series")),
        vendor="Hygon",
        type="dcu",
        uuid=text(values.get("unique id")),
        memory_total_bytes=total or 0,
        memory_used_bytes=_memory(values, "vram total used memory") or 0,
        driver_version=driver,
        # HCU since 2025, DCU before.
        utilization_percent=percent(values.get("hcu use (%)", values.get("dcu use (%)"))),
        temperature_celsius=_temperature(values),
        power_watts=watts(values.get("average graphics package power (w)")),
        problems=[no_memory("hy-smi")] if not total else [],
    )


def _memory(values: Mapping[str, Any], name: str) -> int | None:
    """MiB, as the key says; older versions count bytes, as rocm-smi does."""
    for unit in ("MiB", "B"):
        if (found := values.get(f"{name} ({unit})".lower())) is not None:
            return size(found, unit)
    return None


def _temperature(values: Mapping[str, Any]) -> float | None:
    for sensor in ("junction", "core", "edge"):
        found = celsius(values.get(f"temperature (sensor {sensor}) (c)"))
        if found is not None:
            return found
    return None
