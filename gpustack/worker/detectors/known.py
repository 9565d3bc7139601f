"""What is known of one vendor's devices, look after look. Pure."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gpustack.schemas.workers import Device, DeviceProblem, ProblemCode

#: Bytes that no device has: 1 PiB. More is garbage, and no database would take it.
_TOO_MUCH: Final = 1 << 50

#: Names and versions are cut here; no vendor's comes near.
_LONGEST: Final = 200

#: Processes of one device that are told, largest first: a status stays small.
_PROCESSES: Final = 16

#: Smallest and largest value that a sane sensor gives.
_RANGES: Final[Mapping[str, tuple[float, float]]] = {
    "utilization_percent": (0, 100),
    "temperature_celsius": (-50, 200),
    "power_watts": (0, 10_000),
}

LOST = DeviceProblem(
    code=ProblemCode.LOST, message="it was there and does not answer any more: see the kernel's log"
)


@dataclass(frozen=True, slots=True)
class Known:
    """What one vendor's detector has found so far.

    Attributes:
        devices: those that answer, and those that once did, each with its problems.
        complaints: what is wrong with the detector or what it said, one sentence each; said aloud
            when it changes.
    """

    devices: tuple[Device, ...] = ()
    complaints: tuple[str, ...] = ()


def after_answer(known: Known, found: Iterable[Device]) -> Known:
    """What is known once the detector answered: those that it left out are lost.

    A card that was split into MIG instances, and instances whose card was split anew, are not.
    """
    complaints: list[str] = []
    devices: dict[tuple[str, int], Device] = {}
    earlier = _Lookup(known.devices)
    for device in found:
        before = earlier.same(device)
        if device.memory_total_bytes <= 0 and before is not None:
            problems = device.problems or [LOST]
            device = before.model_copy(update={"problems": problems, **_UNMEASURED})
        try:
            device, odd = _sane(device)
        except ValueError as error:
            why = device.problems[0].message if device.problems else error
            complaints.append(f"{_called(device)} is left out: {why}")
            continue
        complaints += [f"{_called(device)}: {text}" for text in odd]
        key = _key(device)
        if key in devices:
            complaints.append(f"{_called(device)} is left out: another has its index")
            continue
        devices[key] = device
    if not devices and known.devices:
        why = complaints[0] if complaints else "its tool finds none of its devices any more"
        return after_failure(known, why)
    there = [*devices.values(), *_lost(known.devices, devices)]
    return Known(tuple(sorted(there, key=lambda one: one.index)), tuple(complaints))


def _lost(known: Sequence[Device], found: Mapping[tuple[str, int], Device]) -> list[Device]:
    """Those that were known and are not found, each at an index that nobody has.

    Where tools count what they see, the cards behind one that was lost move up: it is listed at
    the index that this leaves free.
    """
    now = _Lookup(found.values())
    gone = [one for one in known if now.same(one) is None and not now.replaces(one)]
    stay = [one for one in gone if _key(one) not in found]
    moved = [one for one in gone if _key(one) in found]
    taken = {*found, *map(_key, stay)}
    free = [key for one in known if (key := _key(one)) not in taken]
    lost = [_as_lost(one, one.index) for one in stay]
    for one in moved:
        place = next((each for each in free if each[0] == one.type), None)
        if place is not None:  # else another took its place
            free.remove(place)
            lost.append(_as_lost(one, place[1]))
    return lost


def _as_lost(device: Device, index: int) -> Device:
    problem = next((one for one in device.problems if one.code is ProblemCode.LOST), LOST)
    if index != device.index:
        message = f"it was there as device {device.index} and does not answer any more: see the "
        problem = DeviceProblem(code=ProblemCode.LOST, message=f"{message}kernel's log")
    return device.model_copy(update={"index": index, "problems": [problem], **_UNMEASURED})


def after_failure(known: Known, why: str) -> Known:
    """What is known once the detector failed: the devices are still there, and not well.

    Args:
        why: a sentence. One that differs in numbers alone from what is known is no news: tools
            put times and process numbers into theirs.
    """
    is_known = all(
        any(each.code is ProblemCode.TOOL for each in one.problems) for one in known.devices
    )
    if is_known and alike(known.complaints, [why]):
        return known
    problem = DeviceProblem(code=ProblemCode.TOOL, message=why[:_LONGEST])
    devices = tuple(
        one.model_copy(update={"problems": [*_lasting(one.problems), problem], **_UNMEASURED})
        for one in known.devices
    )
    return Known(devices, (why,))


def unwell_since(before: Known, now: Known) -> list[str]:
    """A sentence for each problem that a device has now and had not; its tool's are complaints."""
    earlier = _Lookup(before.devices)
    said = []
    for device in now.devices:
        was = earlier.same(device)
        had = {one.code for one in was.problems} if was else set()
        said += [
            f"{_called(device)} of {device.vendor} is unhealthy: {one.message}"
            for one in device.problems
            if one.code not in had and one.code is not ProblemCode.TOOL
        ]
    return said


def alike(some: Sequence[str], others: Sequence[str]) -> bool:
    """Whether two lists of sentences say the same, but for the numbers in them."""
    return [_shape(one) for one in some] == [_shape(other) for other in others]


def distinct(vendors: Iterable[Sequence[Device]]) -> tuple[list[Device], list[str]]:
    """The devices of all vendors, one of each type and index, and who was left out."""
    devices: dict[tuple[str, int], Device] = {}
    complaints = []
    for device in (one for found in vendors for one in found):
        first = devices.setdefault((device.type, device.index), device)
        if first is not device:
            complaints.append(
                f"{_called(device)} is left out: {first.vendor} has a device of that type and index"
            )
    return list(devices.values()), complaints


#: What is not known of a device that does not answer.
_UNMEASURED: Final[Mapping[str, Any]] = {
    "utilization_percent": None,
    "temperature_celsius": None,
    "power_watts": None,
    "processes": [],
}


def _lasting(problems: Iterable[DeviceProblem]) -> list[DeviceProblem]:
    return [one for one in problems if one.code is not ProblemCode.TOOL]


def _key(device: Device) -> tuple[str, int]:
    return device.type, device.index


class _Lookup:
    """Devices by what tells them apart: UUIDs, and where one has none type and index."""

    def __init__(self, devices: Iterable[Device]) -> None:
        self._by_uuid: dict[str, Device] = {}
        self._by_key: dict[tuple[str, int], Device] = {}
        self._parents: set[str] = set()
        for device in devices:
            self._by_key[_key(device)] = device
            if device.uuid:
                self._by_uuid[device.uuid] = device
            if device.parent_uuid:
                self._parents.add(device.parent_uuid)

    def same(self, device: Device) -> Device | None:
        """The one that is `device`."""
        if device.uuid in self._by_uuid:
            return self._by_uuid[device.uuid]
        one = self._by_key.get(_key(device))
        return None if one is None or (one.uuid and device.uuid) else one

    def replaces(self, gone: Device) -> bool:
        """Whether `gone` is no more for a reason: its memory is another device's now."""
        uuids = self._by_uuid.keys() | self._parents
        return bool({gone.uuid, gone.parent_uuid} & uuids)


def _called(device: Device) -> str:
    return f"device {device.index}" + (f" ({device.name[:60]})" if device.name else "")


def _sane(device: Device) -> tuple[Device, list[str]]:
    """The device without values that cannot be, and a sentence for each.

    Raises:
        ValueError: it cannot be used at all.
    """
    if not 0 <= device.index < 1 << 20:
        raise ValueError(f"its index is {device.index}")
    total = device.memory_total_bytes
    if not 0 < total < _TOO_MUCH:
        raise ValueError(f"it has {total} bytes of memory")
    changes: dict[str, Any] = {}
    odd = []
    if not 0 <= device.memory_used_bytes <= total:
        odd.append(f"{device.memory_used_bytes} of {total} bytes are in use, it says")
        changes["memory_used_bytes"] = min(max(device.memory_used_bytes, 0), total)
    for name, (least, most) in _RANGES.items():
        value = getattr(device, name)
        if value is not None and not (math.isfinite(value) and least <= value <= most):
            odd.append(f"{name} is {value}, it says")
            changes[name] = None
    for name, value in device:
        if isinstance(value, str) and (text := _line(value)) != value:
            changes[name] = text
    if len(device.processes) > _PROCESSES:
        largest = sorted(device.processes, key=lambda one: -(one.memory_bytes or 0))
        changes["processes"] = largest[:_PROCESSES]
    return device.model_copy(update=changes), odd


def _shape(sentence: str) -> str:
    return re.sub(r"\d+", "0", sentence)


def _line(text: str) -> str:
    return "".join(letter for letter in text[:_LONGEST] if letter.isprintable())
