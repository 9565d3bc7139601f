"""Huawei Ascend: npu-smi for the chips, hccn_tool for the network port that each has of its own.

One device is one chip: cards such as the Atlas 300I Duo (310P) carry several, and each has memory
of its own. `index` is the chip's logical id, which ASCEND_RT_VISIBLE_DEVICES counts; `npu-smi info
-m` maps it to the card ("NPU ID") and the chip on it, and gives "-" to the card's controller.

Sources: CANN, environment variable ASCEND_RT_VISIBLE_DEVICES ("Device ID is the logical ID");
npu-smi command reference, `info`, `info -m`, `info -t health` (OK, Warning, Alarm, Critical or
UNKNOWN), `info -t board`; HCCN Tool reference.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpustack.schemas.workers import Device, DeviceNetwork, DeviceProblem, ProblemCode
from gpustack.worker.detectors.reading import (
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
from gpustack.worker.detectors.runtimes import completed
from gpustack.worker.detectors.tools import ToolFailed, Tools

#: Chips whose UUID and network are read in one look, in turns: each costs six commands.
CHIPS_A_LOOK: Final = 4

#: A chip: number of the card, number of the chip on it.
_Chip = tuple[int, int]

_BUS_ID: Final = re.compile(r"[0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-9A-Fa-f]")
_USED_OF: Final = re.compile(r"(\d{1,9})\s*/\s*(\d{1,9})")

#: A chip so called is well, or npu-smi does not say how it is (in containers). "Warning" is the
#: lowest of Huawei's three degrees ("general"), and such chips work: in Huawei's own example
#: (EDOC1100388860) they run processes as the others do.
_WELL: Final = frozenset({"OK", "NA", "N/A", "-", "WARNING"})


class Ascend:
    vendor = "Ascend"

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._slow: dict[_Chip, _Slow] = {}
        self._mapping = ""

    def look(self, tools: Tools) -> list[Device]:
        name = program(tools, "npu-smi", "/usr/local/sbin/npu-smi", "/usr/local/bin/npu-smi")
        if name is None:
            return []
        table = tools.run(name, "info")
        # A chip must not change its number because the command failed once.
        self._mapping = _said(tools, name, "info", "-m") or self._mapping
        chips = parse(table, self._mapping)
        # Whose turn it is: dictionaries keep their order; who is new comes first, and who was read
        # moves to the end.
        new = {chip: _Slow() for chip in chips if chip not in self._slow}
        self._slow = new | {chip: slow for chip, slow in self._slow.items() if chip in chips}
        for chip in list(self._slow)[:CHIPS_A_LOOK]:
            slow = self._slow.pop(chip)
            self._slow[chip] = _read_slow(tools, name, chip, chips[chip].port, slow.uuid)
        devices = (
            found.device.model_copy(
                update={"uuid": self._slow[chip].uuid, "network": self._slow[chip].network}
            )
            for chip, found in chips.items()
        )
        return completed(checked(devices, "npu-smi"), self._root)


@dataclass(frozen=True, slots=True)
class _Slow:
    """What takes a command for each chip."""

    uuid: str = ""
    network: DeviceNetwork | None = None


def _read_slow(tools: Tools, name: str, chip: _Chip, port: int, uuid: str) -> _Slow:
    """The UUID once; the network as it is now. What a chip does not have stays empty."""
    card, number_on_card = chip
    if not uuid:
        arguments = ("info", "-t", "board", "-i", str(card), "-c", str(number_on_card))
        uuid = parse_uuid(_said(tools, name, *arguments))
    hccn = program(tools, "hccn_tool", "/usr/local/Ascend/driver/tools/hccn_tool")
    if hccn is None:
        return _Slow(uuid)
    link = _said(tools, hccn, "-i", str(port), "-link", "-g")
    if not link:
        return _Slow(uuid)  # cards for inference have no port
    rest = [_said(tools, hccn, "-i", str(port), f"-{what}", "-g") for what in _ASKED]
    return _Slow(uuid, parse_network("\n".join([link, *rest])))


_ASKED: Final = ("ip", "mac", "gateway", "mtu")


def _said(tools: Tools, name: str, *arguments: str) -> str:
    try:
        return tools.run(name, *arguments)
    except ToolFailed:
        return ""


@dataclass(frozen=True, slots=True)
class Chip:
    """A chip as the table shows it.

    Attributes:
        port: what hccn_tool calls its network port: the physical id, where the table has one.
    """

    device: Device
    port: int


@dataclass(frozen=True, slots=True)
class _Row:
    chip: _Chip
    model: str
    health: str
    physical: int | None
    bus_id: str
    first: str
    second: str


def parse(table: str, mapping: str) -> dict[_Chip, Chip]:
    """The chips of `npu-smi info` and `npu-smi info -m`, in the table's order.

    Args:
        mapping: empty: there is none; then the ids in the table, or the order in it, are taken.

    Raises:
        ValueError: the table is none, or ends in the middle of a chip.
    """
    driver = re.search(r"\bVersion:\s*([\w.+-]{1,60})", table)
    rows = _rows(table)
    logical = _logical_ids(mapping)
    indexes = _indexes(rows, logical)
    found: dict[_Chip, Chip] = {}
    for row, index in zip(rows, indexes, strict=True):
        if row.chip in found:
            raise ValueError(f"npu-smi shows chip {row.chip[1]} of card {row.chip[0]} twice")
        device = _device(
            row, index, driver[1] if driver else "", row.chip in logical or not logical
        )
        found[row.chip] = Chip(device, row.physical if row.physical is not None else index)
    checked((chip.device for chip in found.values()), "npu-smi")
    return found


def _rows(table: str) -> list[_Row]:
    """Two lines for a chip: card, name, health, power and heat; then chip, bus, use and memory.

    Which columns there are depends on the product: the id beside the chip's number is called
    "Device" or "Phy-ID" or is missing, the Ascend 950 has a column for the name, and memory is
    "Memory-Usage", "HBM-Usage" or both.
    """
    if "Health" not in table or "NPU" not in table:
        raise ValueError(f"npu-smi info printed no table of chips, but {said(table)}")
    rows: list[_Row] = []
    above: list[str] | None = None
    for line in table.splitlines():
        if "Process id" in line:
            break
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.lstrip().startswith("|") or len(cells) < 3:
            continue
        if above is None:
            if re.match(r"\d", cells[0]):
                above = cells
            continue
        rows.append(_row(above, cells))
        above = None
    if above is not None:
        raise ValueError(f"npu-smi info ends in the middle of card {above[0][:20]}")
    return rows


def _row(above: list[str], below: list[str]) -> _Row:
    card, _, model = above[0].partition(" ")
    if len(above) > 3:
        model = above[1]
    chip, _, physical = below[0].partition(" ")
    card_id, chip_id = whole(card), whole(chip) if chip else 0
    if card_id is None or chip_id is None or len(below) != len(above):
        raise ValueError(f"npu-smi info printed two lines that are no chip: {above}, {below}")
    if not (_BUS_ID.search(below[-2]) or text(below[-2]) == "" or ":" in below[-2]):
        raise ValueError(f"npu-smi info printed {below[-2][:40]!r} where a bus id belongs")
    return _Row(
        chip=(card_id, chip_id),
        model=text(model.strip()),
        health=above[-2].strip(),
        physical=whole(physical.strip()) if physical.strip() else None,
        bus_id=below[-2],
        first=above[-1],
        second=below[-1],
    )


def _logical_ids(mapping: str) -> dict[_Chip, int]:
    """Columns are named, and more than one space apart; the Ascend 950 has others."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in mapping.splitlines() if line.strip()]
    head = next((line for line in lines if "NPU ID" in line and "Chip ID" in line), None)
    if head is None:
        return {}
    column = {name: place for place, name in enumerate(head)}
    logical = column.get("Chip Logic ID", column.get("Chip Phy-ID"))
    if logical is None:
        return {}
    found: dict[_Chip, int] = {}
    for line in lines:
        if len(line) < len(head):
            continue
        card, chip = whole(line[column["NPU ID"]]), whole(line[column["Chip ID"]])
        index = whole(line[logical])
        if card is not None and chip is not None and index is not None:
            found[(card, chip)] = index
    return found if len(set(found.values())) == len(found) else {}


def _indexes(rows: list[_Row], logical: Mapping[_Chip, int]) -> list[int]:
    """Logical ids; where a chip has none, a number that no other has and no engine is given."""
    if logical:
        free = max(logical.values()) + 1
        missing = [row.chip for row in rows if row.chip not in logical]
        return [
            logical[row.chip] if row.chip in logical else free + missing.index(row.chip)
            for row in rows
        ]
    physical = [row.physical for row in rows if row.physical is not None]
    if len(set(physical)) == len(rows):
        return physical
    return list(range(len(rows)))


def _device(row: _Row, index: int, driver: str, has_id: bool) -> Device:
    power, temperature = ([*row.first.split(), "", ""])[:2]
    use = row.second.split(maxsplit=1)[0] if row.second.split() else ""
    amounts = [(int(used), int(total)) for used, total in _USED_OF.findall(row.second)]
    # The last with a size: chips with HBM show the memory of their processors before it.
    used, total = next((one for one in reversed(amounts) if one[1] > 0), (0, 0))
    architecture = re.sub(r"^Ascend\s*", "", row.model)
    return Device(
        index=index,
        name=f"Ascend {architecture}".strip(),
        vendor="Ascend",
        type="cann",
        memory_total_bytes=size(total, "MB") or 0,
        memory_used_bytes=size(used, "MB") or 0,
        driver_version=driver,
        architecture=architecture,
        utilization_percent=percent(use),
        temperature_celsius=celsius(temperature),
        power_watts=watts(power),
        problems=_problems(row, total, has_id),
    )


def _problems(row: _Row, total: int, has_id: bool) -> list[DeviceProblem]:
    found = []
    if row.health.upper() not in _WELL:
        message = f"npu-smi says that its health is {row.health[:40] or 'not known'}"
        found.append(problem(ProblemCode.REPORTED, message))
    if not has_id:
        message = "npu-smi info -m gives it no logical id: it has not started"
        found.append(problem(ProblemCode.REPORTED, message))
    return found or ([no_memory("npu-smi")] if total <= 0 else [])


def parse_uuid(board: str) -> str:
    """The die's number of `npu-smi info -t board -i … -c …`; empty: it does not say."""
    values = _values(board)
    return text(values.get("vdie id")) or text(values.get("die id"))


def parse_network(answers: str) -> DeviceNetwork:
    """What hccn_tool says to -link, -ip, -mac, -gateway and -mtu, one after the other."""
    values = _values(answers)
    mtu = whole(values.get("mtu"))
    return DeviceNetwork(
        status=text(values.get("link status")).lower(),
        ip=text(values.get("ipaddr")),
        netmask=text(values.get("netmask")),
        mac=text(values.get("mac addr")),
        gateway=text(values.get("default gateway")),
        interface=text(values.get("iface")),
        mtu=mtu if mtu is not None and mtu < 1 << 20 else None,
    )


def _values(output: str) -> dict[str, str]:
    """ "name : value" by name, several on a line where there are commas between them."""
    found: dict[str, str] = {}
    for piece in re.split(r"[\n,]", output):
        name, colon, value = piece.partition(":")
        if colon:
            found.setdefault(name.strip().lower(), value.strip())
    return found
