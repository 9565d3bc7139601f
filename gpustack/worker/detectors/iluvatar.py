"""Iluvatar: ixsmi, its XML, or its table where this version has none.

`index` is the place in ixsmi's own order, which CUDA_VISIBLE_DEVICES counts on CoreX; the minor
number is not, for in a container it stays the host's. The runtime's version is that of CUDA that
CoreX stands in for. ixsmi does not say the architecture.

ixsmi needs CoreX's libraries: without LD_LIBRARY_PATH=/usr/local/corex/lib64 it fails and says so.
"""

import re
import xml.etree.ElementTree as ET
from typing import Final

from gpustack.schemas.workers import Device, DeviceProblem, ProblemCode
from gpustack.worker.detectors.reading import (
    cards,
    celsius,
    checked,
    no_memory,
    percent,
    problem,
    program,
    said,
    size,
    text,
    watts,
    whole,
)
from gpustack.worker.detectors.tools import ToolFailed, Tools

_PLACES: Final = ("ixsmi", "/usr/local/corex/bin/ixsmi")

_FIRST: Final = re.compile(r"\|\s*(\d{1,4})\s{2,}([^|]{1,80})\|[^|]*\|[^|]*\|")
_SECOND: Final = re.compile(
    r"\|\s*\S+\s+(\S+)\s+\S+\s+(\S+)\s*/[^|]*\|\s*(\d{1,9}MiB)\s*/\s*(\d{1,9}MiB)\s*\|\s*(\S+)"
)


class Iluvatar:
    vendor = "Iluvatar"

    def look(self, tools: Tools) -> list[Device]:
        name = program(tools, *_PLACES)
        if name is None:
            return []
        try:
            return parse(tools.run(name, "-q", "-x"))
        except (ToolFailed, ValueError):
            return parse_table(tools.run(name))


def parse(output: str) -> list[Device]:
    """Devices from `ixsmi -q -x`.

    Raises:
        ValueError: it is no such output.
    """
    start = output.find("<?xml")
    if start < 0 or "<!ENTITY" in output:
        raise ValueError("ixsmi printed no XML")
    try:
        log = ET.fromstring(output[start:].strip())  # noqa: S314  a tool of this machine
    except (ET.ParseError, LookupError) as error:
        raise ValueError(f"ixsmi printed XML that cannot be read: {error}") from None
    if log.tag != "ixsmi_log":
        raise ValueError(f"ixsmi printed a {log.tag[:40]} instead of its log")
    driver, cuda = text(log.findtext("driver_version")), text(log.findtext("cuda_version"))
    cards = log.findall("gpu")
    attached = whole(log.findtext("attached_gpus"))
    if attached is not None and attached != len(cards):
        raise ValueError(f"ixsmi counts {attached} GPUs and shows {len(cards)}")
    return checked(
        (_device(index, card, driver, cuda) for index, card in enumerate(cards)), "ixsmi"
    )


def _device(index: int, card: ET.Element, driver: str, cuda: str) -> Device:
    total = size(card.findtext("memory_usage/total"))
    return Device(
        index=index,
        name=text(card.findtext("product_name")),
        vendor="Iluvatar",
        type="corex",
        uuid=text(card.findtext("uuid")),
        memory_total_bytes=total or 0,
        memory_used_bytes=size(card.findtext("memory_usage/used")) or 0,
        driver_version=driver,
        runtime_version=cuda,
        utilization_percent=percent(card.findtext("utilization/gpu_util")),
        temperature_celsius=celsius(card.findtext("temperature/gpu_temp")),
        power_watts=watts(card.findtext("power_readings/gpu_power_draw")),
        problems=[no_memory("ixsmi")] if not total else _problems(card),
    )


def _problems(card: ET.Element) -> list[DeviceProblem]:
    found = []
    errors = whole(card.findtext("ecc_errors/double_bit"))
    if errors:
        message = f"ixsmi counts {errors} memory errors that could not be corrected"
        found.append(problem(ProblemCode.ECC, message))
    degrees = celsius(card.findtext("temperature/gpu_temp"))
    limit = celsius(card.findtext("temperature/gpu_temp_slow_threshold"))
    if degrees is not None and limit is not None and degrees >= limit > 0:
        message = f"it is {degrees:g} °C hot: it slows down from {limit:g} °C on"
        found.append(problem(ProblemCode.THERMAL, message))
    return found


def parse_table(output: str) -> list[Device]:
    """Devices from `ixsmi`: two lines for a card.

    Raises:
        ValueError: it is no such table, or ends in the middle of a card.
    """
    head = re.search(
        r"Driver Version:\s*([\w.+-]{1,60})\s+CUDA Version:\s*([\w./+-]{1,60})", output
    )
    if head is None:
        raise ValueError(f"ixsmi printed no table of GPUs, but {said(output)}")
    found = [
        _row(first, second, head[1], text(head[2]))
        for first, second in cards(output, _FIRST, _SECOND, called="ixsmi's GPU")
    ]
    return checked(found, "ixsmi")


def _row(first: re.Match[str], second: re.Match[str], driver: str, cuda: str) -> Device:
    temperature, power, used, total, use = second.groups()
    return Device(
        index=int(first[1]),
        name=text(first[2].strip()),
        vendor="Iluvatar",
        type="corex",
        memory_total_bytes=size(total) or 0,
        memory_used_bytes=size(used) or 0,
        driver_version=driver,
        runtime_version=cuda,
        utilization_percent=percent(use),
        temperature_celsius=celsius(temperature),
        power_watts=watts(power),
        problems=[] if size(total) else [no_memory("ixsmi")],
    )
