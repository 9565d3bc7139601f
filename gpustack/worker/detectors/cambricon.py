"""Cambricon: the table that cnmon prints.

`cnmon info … -j` writes its JSON to a file in the current folder, and no example of it is public;
the table is on standard output and has been of one shape since version 4. It says no UUID and no
architecture. What its column "Ecc-Error" counts is not documented: it is
left alone.

`index` is what cnmon calls "Card", which MLU_VISIBLE_DEVICES counts.
"""

import re
from pathlib import Path
from typing import Final

from gpustack.schemas.workers import Device
from gpustack.worker.detectors.reading import (
    cards,
    celsius,
    checked,
    no_memory,
    percent,
    program,
    said,
    size,
    text,
    watts,
)
from gpustack.worker.detectors.runtimes import completed
from gpustack.worker.detectors.tools import Tools

_VERSION: Final = re.compile(r"CNMON\s+v[\w.+-]{1,40}(?:\s+Driver\s+(v[\w.+-]{1,40}))?")

#: Card, virtual function, name, firmware; bus id, or "On" and the driver's version; use.
_FIRST: Final = re.compile(
    r"\|\s*(\d{1,4})\s+\S+\s+(\S[^|]{0,60}?)\s+v[\w.+-]{1,40}\s*\|([^|]*)\|\s*(\S+)[^|]*\|"
)

#: Fan, temperature, power of its limit; memory.
_SECOND: Final = re.compile(
    r"\|\s*\S+\s+(\S+)\s+(\d{1,6})\s*W\s*/[^|]*\|\s*(\d{1,9}\s*MiB)\s*/\s*(\d{1,9}\s*MiB)\s*\|"
)


class Cambricon:
    vendor = "Cambricon"

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def look(self, tools: Tools) -> list[Device]:
        name = program(tools, "cnmon", "/usr/bin/cnmon", "/usr/local/neuware/bin/cnmon")
        return [] if name is None else completed(parse(tools.run(name)), self._root)


def parse(output: str) -> list[Device]:
    """Devices from `cnmon`: two lines for a card.

    Raises:
        ValueError: it is no such table, or ends in the middle of a card.
    """
    version = _VERSION.search(output)
    if version is None:
        raise ValueError(f"cnmon printed no table of cards, but {said(output)}")
    found = [
        _device(first, second, version[1] or _driver(first[3]))
        for first, second in cards(output, _FIRST, _SECOND, called="cnmon's card")
    ]
    return checked(found, "cnmon")


def _driver(cell: str) -> str:
    """Of a card, where version 4 shows it."""
    found = re.search(r"\bv[\w.+-]{1,40}", cell)
    return found[0] if found else ""


def _device(first: re.Match[str], second: re.Match[str], driver: str) -> Device:
    temperature, power, used, total = second.groups()
    return Device(
        index=int(first[1]),
        name=text(first[2]),
        vendor="Cambricon",
        type="mlu",
        memory_total_bytes=size(total) or 0,
        memory_used_bytes=size(used) or 0,
        driver_version=driver,
        utilization_percent=percent(first[4]),
        temperature_celsius=celsius(temperature),
        power_watts=watts(power),
        problems=[] if size(total) else [no_memory("cnmon")],
    )
