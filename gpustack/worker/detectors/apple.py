"""Apple silicon: system_profiler. One GPU, whose memory is the machine's.

`index` is 0: Metal counts one device, and no variable chooses among them. How busy, hot and hungry
the GPU is, macOS tells only to root (powermetrics): it stays empty. The GPUs of Intel Macs are left
out; no engine that we run uses them.
"""

import re

import psutil

from gpustack.schemas.workers import Device
from gpustack.worker.detectors.reading import checked, inside, json_of, no_memory, size, text
from gpustack.worker.detectors.tools import Tools


class Apple:
    vendor = "Apple"

    def look(self, tools: Tools) -> list[Device]:
        if not tools.has("system_profiler"):
            return []
        arguments = ("SPHardwareDataType", "SPDisplaysDataType", "-json")
        memory = psutil.virtual_memory()
        return parse(
            tools.run("system_profiler", *arguments), used_bytes=memory.total - memory.available
        )


def parse(output: str, *, used_bytes: int) -> list[Device]:
    """The GPU of `system_profiler SPHardwareDataType SPDisplaysDataType -json`, if it is Apple's.

    Args:
        used_bytes: of the machine's memory, by whatever is there.

    Raises:
        ValueError: it is no such output.
    """
    said = json_of(output, "system_profiler")
    machines, displays = inside(said, "SPHardwareDataType"), inside(said, "SPDisplaysDataType")
    if not isinstance(machines, list) or not isinstance(displays, list):
        raise ValueError("system_profiler printed no list of machine and displays")
    total = size(inside(machines[0], "physical_memory")) if machines else None
    gpus = [one for one in displays if inside(one, "spdisplays_vendor") == "sppci_vendor_Apple"]
    return checked((_device(one, total, used_bytes) for one in gpus[:1]), "system_profiler")


def _device(gpu: object, total: int | None, used_bytes: int) -> Device:
    name = text(inside(gpu, "sppci_model")) or text(inside(gpu, "_name"))
    support = text(inside(gpu, "spdisplays_mtlgpufamilysupport"))
    metal = re.fullmatch(r"spdisplays_metal(\d{1,2})", support)
    return Device(
        index=0,
        name=name,
        vendor="Apple",
        type="mps",
        memory_total_bytes=total or 0,
        memory_used_bytes=min(max(used_bytes, 0), total or 0),
        memory_unified=True,
        runtime_version=f"Metal {metal[1]}" if metal else "",
        architecture=name.removeprefix("Apple ").strip(),
        problems=[no_memory("system_profiler")] if not total else [],
    )
