"""Bytes and durations as people read and write them."""

import re

KIB, MIB, GIB = 1024, 1024**2, 1024**3

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def gib(count: int) -> str:
    """`count` bytes in words: "18.2 GiB", below a tenth of a GiB "7.5 MiB"."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / MIB:.1f} MiB"


def seconds(text: str) -> float:
    """A duration such as "90", "90s", "5m" or "1h30m" in seconds.

    Raises:
        ValueError: it is none of these.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"want a duration such as 30s, 5m or 1h30m, got {text!r}")
    return sum(float(number) * _SECONDS[unit or "s"] for number, unit in parts)
