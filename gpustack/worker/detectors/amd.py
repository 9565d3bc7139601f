"""AMD: amd-smi of ROCm 6 and 7, rocm-smi where it is missing or fails.

`index` is HIP's, which HIP_VISIBLE_DEVICES and ROCR_VISIBLE_DEVICES count. amd-smi counts by PCI
address instead, and the two differ on real machines. HIP counts the nodes of the kernel's topology
(KFD) that are GPUs, in their order: amd-smi says so itself as `hip_id` in `list -e` (which it
computes as the node less the first GPU's node), and older ones say `node_id`, rocm-smi "Node ID".

Sources: AMD SMI Python API reference, amdsmi_get_gpu_enumeration_info (hip_id, "the HIP enumeration
ID"); ROCm documentation, GPU isolation techniques; ROCm/rocm_smi_lib issue 122.
"""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gpustack.schemas.workers import Device, DeviceProblem, ProblemCode
from gpustack.worker.detectors.reading import (
    celsius,
    checked,
    inside,
    json_of,
    no_memory,
    number,
    percent,
    problem,
    program,
    size,
    text,
    watts,
    whole,
)
from gpustack.worker.detectors.runtimes import completed
from gpustack.worker.detectors.tools import ToolFailed, Tools

#: Seconds for which names, limits and numbers of the cards are taken as read: amd-smi needs about a
#: second to start, whatever it is asked.
FACTS_S: Final = 600.0

_ROCM_SMI: Final = (
    "--showproductname",
    "--showuniqueid",
    "--showdriverversion",
    "--showmeminfo",
    "vram",
    "--showuse",
    "--showtemp",
    "--showpower",
    "--json",
)


@dataclass(frozen=True, slots=True)
class _Facts:
    listing: str
    static: str
    read_at: float


class Amd:
    vendor = "AMD"

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._facts: _Facts | None = None
        self._listing = ""

    def look(self, tools: Tools) -> list[Device]:
        return completed(self._look(tools), self._root)

    def _look(self, tools: Tools) -> list[Device]:
        old = program(tools, "rocm-smi", "/opt/rocm/bin/rocm-smi")
        if name := program(tools, "amd-smi", "/opt/rocm/bin/amd-smi"):
            try:
                return self._amd_smi(tools, name)
            except (ToolFailed, ValueError):
                self._facts = None
                if old is None:
                    raise
        if old is None:
            return []
        return parse_rocm_smi(tools.run(old, *_ROCM_SMI))

    def _amd_smi(self, tools: Tools, name: str) -> list[Device]:
        facts = self._facts
        if facts is None or time.monotonic() - facts.read_at > FACTS_S:
            static = tools.run(name, "static", "--asic", "--driver", "--vram", "--limit", "--json")
            # A card must not change its number because the command failed once.
            self._listing = _listing(tools, name) or self._listing
            facts = _Facts(self._listing, static, time.monotonic())
        metric = tools.run(
            name,
            "metric",
            "--usage",
            "--power",
            "--temperature",
            "--ecc",
            "--mem-usage",
            "--json",
        )
        devices = parse(facts.listing, facts.static, metric)
        # A card that came or went: names and numbers are read anew at the next look.
        same = _by_gpu(facts.static, "amd-smi static").keys() == _by_gpu(metric, "").keys()
        self._facts = facts if same else None
        return devices


def _listing(tools: Tools, name: str) -> str:
    """Numbers of the cards; empty where this amd-smi does not know the command."""
    for arguments in (("list", "-e", "--json"), ("list", "--json")):
        try:
            listing = tools.run(name, *arguments)
            _by_gpu(listing, "amd-smi list")
        except (ToolFailed, ValueError):
            continue
        return listing
    return ""


def parse(listing: str, static: str, metric: str) -> list[Device]:
    """Devices from `amd-smi list`, `static` and `metric`, each with --json.

    Args:
        listing: empty: there is none; then amd-smi's own numbers are taken.

    Raises:
        ValueError: one of them is no such output.
    """
    facts = _by_gpu(static, "amd-smi static")
    measures = _by_gpu(metric, "amd-smi metric")
    numbers = _by_gpu(listing, "amd-smi list") if listing else {}
    gpus = sorted({*facts, *measures})
    index = _indexes(gpus, numbers)
    return checked(
        (
            _device(index[gpu], facts.get(gpu, {}), measures.get(gpu, {}), numbers.get(gpu, {}))
            for gpu in gpus
        ),
        "amd-smi",
    )


def _by_gpu(output: str, tool: str) -> dict[int, dict[str, Any]]:
    """ROCm 6 prints a list; from ROCm 7 on it lies below "gpu_data"."""
    value = json_of(output, tool)
    if isinstance(value, dict):
        value = value.get("gpu_data")
    if not isinstance(value, list):
        raise ValueError(f"{tool} printed JSON without a list of GPUs")
    found: dict[int, dict[str, Any]] = {}
    for one in value:
        gpu = whole(inside(one, "gpu"))
        if gpu is None or gpu in found:
            raise ValueError(f"{tool} printed a GPU without a number of its own")
        found[gpu] = one
    return found


def _indexes(gpus: list[int], numbers: Mapping[int, Mapping[str, Any]]) -> dict[int, int]:
    for read in (_hip_ids, _node_ranks):
        found = read([numbers.get(gpu, {}) for gpu in gpus])
        if found is not None:
            return dict(zip(gpus, found, strict=True))
    return {gpu: gpu for gpu in gpus}


def _hip_ids(numbers: list[Mapping[str, Any]]) -> list[int] | None:
    ids = [whole(one.get("hip_id")) for one in numbers]
    return _distinct(ids)


def _node_ranks(numbers: list[Mapping[str, Any]]) -> list[int] | None:
    nodes = _distinct([whole(one.get("node_id")) for one in numbers])
    return None if nodes is None else [sorted(nodes).index(node) for node in nodes]


def _distinct(ids: list[int | None]) -> list[int] | None:
    known = [one for one in ids if one is not None]
    return known if len(set(known)) == len(ids) else None


def _device(
    index: int,
    facts: Mapping[str, Any],
    measures: Mapping[str, Any],
    numbers: Mapping[str, Any],
) -> Device:
    total = size(inside(measures, "mem_usage", "total_vram"))
    if total is None:
        total = size(inside(facts, "vram", "size"))
    problems = [no_memory("amd-smi")] if not total else _problems(facts, measures)
    if not measures:
        problems = [problem(ProblemCode.TOOL, "amd-smi metric says nothing of it")]
    return Device(
        index=index,
        name=text(inside(facts, "asic", "market_name")),
        vendor="AMD",
        type="rocm",
        uuid=text(numbers.get("hip_uuid"))
        or text(numbers.get("uuid"))
        or text(inside(facts, "asic", "asic_serial")),
        memory_total_bytes=total or 0,
        memory_used_bytes=size(inside(measures, "mem_usage", "used_vram")) or 0,
        driver_version=text(inside(facts, "driver", "version")),
        architecture=text(inside(facts, "asic", "target_graphics_version")),
        utilization_percent=percent(inside(measures, "usage", "gfx_activity")),
        temperature_celsius=_hottest(measures),
        power_watts=watts(inside(measures, "power", "socket_power")),
        problems=problems,
    )


def _hottest(measures: Mapping[str, Any]) -> float | None:
    """The hot spot, which is what the card slows down for; Instinct cards have no edge sensor."""
    for sensor in ("hotspot", "edge"):
        found = celsius(inside(measures, "temperature", sensor))
        if found is not None:
            return found
    return None


def _problems(facts: Mapping[str, Any], measures: Mapping[str, Any]) -> list[DeviceProblem]:
    """ECC and heat. `throttle_status` says nothing of either: a card at its power limit has it."""
    found = []
    errors = whole(inside(measures, "ecc", "total_uncorrectable_count"))
    if errors:
        message = f"amd-smi counts {errors} memory errors that could not be corrected"
        found.append(problem(ProblemCode.ECC, message))
    for sensor, limit_name in (
        ("hotspot", "slowdown_hotspot_temperature"),
        ("edge", "slowdown_edge_temperature"),
        ("mem", "slowdown_vram_temperature"),
    ):
        degrees = celsius(inside(measures, "temperature", sensor))
        limit = celsius(inside(facts, "limit", limit_name))
        if degrees is not None and limit is not None and degrees >= limit > 0:
            message = f"{sensor} sensor at {degrees:g} °C: it slows down from {limit:g} °C on"
            found.append(problem(ProblemCode.THERMAL, message))
            break
    return found


def parse_rocm_smi(output: str) -> list[Device]:
    """Devices from `rocm-smi … --json`.

    Hygon's driver brings a rocm-smi too: cards of other vendors are left out.

    Raises:
        ValueError: it is no such output.
    """
    if "No JSON data to report" in output:
        return []  # rocm-smi's way to say that there is no card
    cards = json_of(output, "rocm-smi")
    if not isinstance(cards, dict):
        raise ValueError("rocm-smi printed a list, not the cards by name")
    found: dict[int, Mapping[str, Any]] = {}
    for name, card in cards.items():
        place = re.fullmatch(r"card(\d{1,4})", name)
        if place is None:
            continue  # "system"
        if not isinstance(card, dict):
            raise ValueError(f"rocm-smi printed {name} without its values")
        values = {key.strip().lower(): value for key, value in card.items()}
        if _is_amd(values):
            if int(place[1]) in found:
                raise ValueError(f"rocm-smi printed {name} twice")
            found[int(place[1])] = values
    if not found and not cards:
        raise ValueError("rocm-smi printed no card")
    driver = text(inside(cards, "system", "Driver version"))
    nodes = _node_ranks([{"node_id": values.get("node id")} for values in found.values()])
    return checked(
        (
            _card(nodes[place] if nodes is not None else card, values, driver)
            for place, (card, values) in enumerate(found.items())
        ),
        "rocm-smi",
    )


def _is_amd(values: Mapping[str, Any]) -> bool:
    vendor = text(values.get("card vendor")).lower()
    return not vendor or "advanced micro devices" in vendor or "amd" in vendor.split()


def _card(index: int, values: Mapping[str, Any], driver: str) -> Device:
    total = size(values.get("vram total memory (b)"), "B")
    return Device(
        index=index,
        name=text(values.get("card series")) or text(values.get("device name")),
        vendor="AMD",
        type="rocm",
        uuid=text(values.get("unique id")),
        memory_total_bytes=total or 0,
        memory_used_bytes=size(values.get("vram total used memory (b)"), "B") or 0,
        driver_version=driver,
        architecture=text(values.get("gfx version")),
        utilization_percent=percent(values.get("gpu use (%)")),
        temperature_celsius=_first(
            values, "temperature (sensor junction) (c)", "temperature (sensor edge) (c)"
        ),
        power_watts=watts(
            values.get("average graphics package power (w)")
            or values.get("current socket graphics package power (w)")
        ),
        problems=[no_memory("rocm-smi")] if not total else [],
    )


def _first(values: Mapping[str, Any], *keys: str) -> float | None:
    for key in keys:
        if number(values.get(key)) is not None:
            return celsius(values.get(key))
    return None
