"""What the tools of vendors have in common: numbers with units, JSON among warnings, "N/A"."""

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final

from gpustack.schemas.workers import Device, DeviceProblem, ProblemCode
from gpustack.worker.detectors.tools import Tools

#: What a tool that writes "MB" or "GB" means is a power of 1024: amd-smi divides bytes by 1 << 20
#: (8176 "MB" of a card with 8 GiB), npu-smi shows 64 GiB as 65536 "MB", macOS 16 GiB as "16 GB".
_UNITS: Final = {
    "b": 1,
    "bytes": 1,
    "kb": 1 << 10,
    "kib": 1 << 10,
    "mb": 1 << 20,
    "mib": 1 << 20,
    "gb": 1 << 30,
    "gib": 1 << 30,
    "tb": 1 << 40,
    "tib": 1 << 40,
}

_NUMBER: Final = re.compile(r"\s*([+-]?\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]*)")

#: More is a misread number: no device has 1 PiB.
_MOST_BYTES: Final = 1 << 50

#: Devices of one vendor; 16 cards of 7 MIG instances each are 112. Thousands, which garbage can
#: show, would hold up the event loop: what is done with them grows with their number.
MOST_DEVICES: Final = 128

#: Ways of saying nothing.
_NOTHING: Final = frozenset(
    {"", "-", "n/a", "na", "[n/a]", "none", "null", "unknown", "not supported"}
)

#: Letters of a name or version that are kept.
_LONGEST: Final = 200

#: Lines before the JSON that are warnings of the tool itself, at most.
_MOST_WARNINGS: Final = 50


def program(tools: Tools, *names: str) -> str | None:
    """The first of these programs that is there: a name on PATH, or the vendor's own folder.

    Services have a short PATH, and vendors install below /opt and /usr/local.
    """
    return next((name for name in names if tools.has(name)), None)


def text(value: object) -> str:
    """A word or name on one line; empty where the tool says that it has none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    word = "".join(one for one in str(value)[:_LONGEST] if one.isprintable()).strip()
    return "" if word.lower() in _NOTHING else word


def number(value: object) -> float | None:
    """12.0 of 12, "12", "12 W", "12%", "12C" or {"value": 12, "unit": "W"}; None of all else."""
    if isinstance(value, dict):
        value = value.get("value")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if isinstance(value, str):
        found = _NUMBER.match(value)
        return float(found[1]) if found else None
    # Integers of JSON have no end, and floats of it may be no number.
    if abs(value) > 1e20 or math.isnan(value):
        return None
    return float(value)


def whole(value: object) -> int | None:
    """A count or an index: not negative, not broken."""
    found = number(value)
    if found is None or found < 0 or found != int(found):
        return None
    return int(found)


def size(value: object, unit: str = "") -> int | None:
    """Bytes of "81920MiB", "16 GB", {"value": 8176, "unit": "MB"}, or a number in `unit`.

    None: it is no size. The units are powers of 1024, whatever they are called.
    """
    if isinstance(value, dict):
        unit = text(value.get("unit")) or unit
        value = value.get("value")
    if isinstance(value, str) and (found := _NUMBER.match(value)) and found[2]:
        unit = found[2]
    amount, scale = number(value), _UNITS.get(unit.lower())
    if amount is None or scale is None:
        return None
    total = int(amount * scale)
    return total if 0 <= total <= _MOST_BYTES else None


def percent(value: object) -> float | None:
    found = number(value)
    return found if found is not None and 0 <= found <= 100 else None


def watts(value: object) -> float | None:
    found = number(value)
    return found if found is not None and 0 <= found <= 10_000 else None


def celsius(value: object) -> float | None:
    found = number(value)
    return found if found is not None and -50 <= found <= 200 else None


def inside(value: object, *keys: str) -> Any:
    """What lies in nested objects of JSON; None where there is none, or something else."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def json_of(output: str, tool: str) -> Any:
    """The JSON that a tool printed, also among its warnings.

    amd-smi writes "WARNING: …" before it (ROCm/amdsmi pull request 114), hy-smi and rocm-smi
    likewise. It begins at the start of a line; a piece of something that was cut is not taken.

    Raises:
        ValueError: there is none, or it is broken.
    """
    starts = [found.start() for found in re.finditer(r"^[\[{]", output, re.MULTILINE)]
    for start in starts[:_MOST_WARNINGS]:
        try:
            value, end = json.JSONDecoder().raw_decode(output, start)
        except RecursionError:
            raise ValueError(f"{tool} printed JSON that is nested too deeply") from None
        except ValueError:
            continue
        # "[WARNING] 3 of …" is no list, and "[1] 2" is no answer.
        if isinstance(value, dict) or (value and all(isinstance(one, dict) for one in value)):
            return value
        if value == [] and not output[end:].strip():
            return value
    raise ValueError(f"{tool} printed no JSON that can be read, but {said(output)}")


def cards(
    output: str, first: re.Pattern[str], second: re.Pattern[str], *, called: str
) -> Iterator[tuple[re.Match[str], re.Match[str]]]:
    """The two lines of each card in a table, above its list of processes.

    Args:
        first: whose first group is the card's number.
        called: whose table it is and what it lists, such as "ixsmi's GPU".

    Raises:
        ValueError: the table ends in the middle of a card.
    """
    lines = [line.strip() for line in output.splitlines()]
    for place, line in enumerate(lines):
        if "Processes:" in line:
            return
        if (upper := first.match(line)) is None:
            continue
        below = lines[place + 1] if place + 1 < len(lines) else ""
        if (lower := second.match(below)) is None:
            whose, _, what = called.partition(" ")
            raise ValueError(f"{whose} table ends in the middle of {what} {upper[1]}")
        yield upper, lower


def said(output: str) -> str:
    """What to tell of an output that is none: its last line, where tools say why they fail."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return repr(lines[-1][:120]) if lines else "nothing"


def problem(code: ProblemCode, message: str) -> DeviceProblem:
    return DeviceProblem(code=code, message=message)


def no_memory(tool: str) -> DeviceProblem:
    return problem(ProblemCode.TOOL, f"{tool} does not say how much memory it has")


def few(devices: Iterable[Device], tool: str) -> list[Device]:
    """The devices.

    Raises:
        ValueError: there are more than any machine has; the rest is not even looked at.
    """
    found = list(itertools.islice(devices, MOST_DEVICES + 1))
    if len(found) > MOST_DEVICES:
        raise ValueError(f"{tool} shows more than {MOST_DEVICES} devices")
    return found


def checked(devices: Iterable[Device], tool: str) -> list[Device]:
    """The devices, by index.

    Raises:
        ValueError: two have one index: an engine could not be told which of them to use. Or there
            are more than any machine has.
    """
    found = sorted(few(devices, tool), key=lambda one: one.index)
    for one, following in itertools.pairwise(found):
        if one.index == following.index:
            raise ValueError(f"{tool} shows two devices with the index {one.index}")
    return found
