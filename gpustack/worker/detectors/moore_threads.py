"""Moore Threads: mthreads-gmi, its JSON, or its table where this version has none.

`index` is what mthreads-gmi calls "Index" or "ID", which MUSA_VISIBLE_DEVICES counts. The table
says neither UUID nor power. No version says the architecture.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpustack.schemas.workers import Device
from gpustack.worker.detectors.reading import (
    celsius,
    checked,
    inside,
    json_of,
    no_memory,
    percent,
    program,
    said,
    size,
    text,
    watts,
    whole,
)
from gpustack.worker.detectors.runtimes import completed
from gpustack.worker.detectors.tools import ToolFailed, Tools

_DRIVER = re.compile(r"Driver Version:\s*([\w.+-]{1,60})")
_FIRST = re.compile(r"(\d{1,4})\s{2,}([^|]{1,80})\|[^|]*\|\s*(\S+)\s+(\d{1,9}MiB)\((\d{1,9}MiB)\)")
_SECOND = re.compile(r"\s[^|]{1,80}\|[^|]*\|\s*(\S+)")


class MooreThreads:
    vendor = "Moore Threads"

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def look(self, tools: Tools) -> list[Device]:
        name = program(tools, "mthreads-gmi", "/usr/bin/mthreads-gmi")
        if name is None:
            return []
        try:
            devices = parse(tools.run(name, "-q", "--json"))
        except (ToolFailed, ValueError):
            devices = parse_table(tools.run(name))
        return completed(devices, self._root)


def parse(output: str) -> list[Device]:
    """Devices from `mthreads-gmi -q --json`.

    Raises:
        ValueError: it is no such output.
    """
    log = json_of(output, "mthreads-gmi")
    cards = inside(log, "GPU")
    if not isinstance(cards, list):
        raise ValueError("mthreads-gmi printed JSON without a list of GPUs")
    driver = text(inside(log, "Driver Version"))
    return checked((_device(card, driver) for card in cards), "mthreads-gmi")


def _device(card: object, driver: str) -> Device:
    index = whole(inside(card, "Index"))
    if index is None:
        raise ValueError("mthreads-gmi printed a GPU without an index")
    memory = _trimmed(inside(card, "FB Memory Usage"))
    total = size(memory.get("Total"))
    return Device(
        index=index,
        name=text(inside(card, "Product Name")),
        vendor="Moore Threads",
        type="musa",
        uuid=text(inside(card, "GPU UUID")),
        memory_total_bytes=total or 0,
        memory_used_bytes=size(memory.get("Used")) or 0,
        driver_version=driver,
        utilization_percent=percent(_trimmed(inside(card, "Utilization")).get("Gpu")),
        temperature_celsius=celsius(_trimmed(inside(card, "Temperature")).get("GPU Current Temp")),
        power_watts=watts(_trimmed(inside(card, "Power Readings")).get("Power Draw")),
        problems=[no_memory("mthreads-gmi")] if not total else [],
    )


def _trimmed(value: object) -> Mapping[str, Any]:
    """Its keys without blanks: the tool writes "Power Draw " with one at the end."""
    return {key.strip(): one for key, one in value.items()} if isinstance(value, dict) else {}


def parse_table(output: str) -> list[Device]:
    """Devices from `mthreads-gmi`: two or three lines for a card, below each other.

    Raises:
        ValueError: it is no such table.
    """
    version = _DRIVER.search(output)
    if version is None:
        raise ValueError(f"mthreads-gmi printed no table of GPUs, but {said(output)}")
    found = []
    lines = output.splitlines()
    for place, line in enumerate(lines):
        if line.startswith("Processes:"):
            break
        if (first := _FIRST.match(line)) is None:
            continue
        following = lines[place + 1] if place + 1 < len(lines) else ""
        second = _SECOND.match(following)
        found.append(_row(first, second, version[1]))
    return checked(found, "mthreads-gmi")


def _row(first: re.Match[str], second: re.Match[str] | None, driver: str) -> Device:
    index, name, use, used, total = first.groups()
    return Device(
        index=int(index),
        name=text(name.strip()),
        vendor="Moore Threads",
        type="musa",
        memory_total_bytes=size(total) or 0,
        memory_used_bytes=size(used) or 0,
        driver_version=driver,
        utilization_percent=percent(use),
        temperature_celsius=celsius(second[1]) if second else None,
        problems=[] if size(total) else [no_memory("mthreads-gmi")],
    )
