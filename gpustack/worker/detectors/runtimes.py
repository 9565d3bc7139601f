"""Versions of the software that engines run on, where the vendor's tool does not say them.

They stand in files of the installation, so they are known where it is on the host; engines in
containers bring their own.

Sources: ROCm, ROCm/legacy-rocm-build issue 419 and ROCm/TheRock issue 5475 ("7.14.0"); CANN,
quick start, "check the version field", and vllm-project/vllm-ascend issue 632; DTK, reports of
`/opt/dtk/.info/rocm_version` ("25.04.4"); MUSA, docs.mthreads.com, "the authority for the
toolkit's version"; NeuWare, reports of version.txt ("Neuware Version 3.9.0").
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from gpustack.schemas.workers import Device

#: Bytes of such a file that are read. The longest, MUSA's, begins with its version.
_MOST: Final = 64 << 10

_NUMBERS: Final = r"(\d+(?:\.\d+)+)"

#: By type of device: files, as patterns below the root, and where the version stands in them.
_FILES: Final[Mapping[str, tuple[tuple[str, ...], re.Pattern[str]]]] = {
    "rocm": (
        ("opt/rocm/.info/version", "opt/rocm/core/.info/version"),
        re.compile(_NUMBERS),
    ),
    "cann": (
        (
            "usr/local/Ascend/cann/*-linux/ascend_toolkit_install.info",
            "usr/local/Ascend/ascend-toolkit/latest/*-linux/ascend_toolkit_install.info",
        ),
        re.compile(r"^version=(\d[\w.]*)", re.MULTILINE),
    ),
    "dcu": (("opt/dtk/.info/rocm_version",), re.compile(_NUMBERS)),
    "musa": (
        ("usr/local/musa/version.json",),
        re.compile(r'"musa_toolkits"\s*:\s*\{\s*"version"\s*:\s*"' + _NUMBERS),
    ),
    "mlu": (("usr/local/neuware/version.txt",), re.compile(_NUMBERS)),
}


def completed(devices: Iterable[Device], root: Path) -> list[Device]:
    """The devices, each with the version of its runtime, where it is found below `root`."""
    found: dict[str, str] = {}
    told = []
    for device in devices:
        if not device.runtime_version:
            if device.type not in found:
                found[device.type] = _version(device.type, root)
            device = device.model_copy(update={"runtime_version": found[device.type]})
        told.append(device)
    return told


def _version(kind: str, root: Path) -> str:
    """Empty: there is no such file, it cannot be read, or says something else."""
    patterns, version = _FILES.get(kind, ((), re.compile("")))
    for pattern in patterns:
        try:
            for path in sorted(root.glob(pattern)):
                with path.open("rb") as file:
                    text = file.read(_MOST).decode(errors="replace")
                if said := version.search(text):
                    return said[1][:60]
        except OSError:
            continue
    return ""
