"""Whether what a worker says of its NVIDIA cards is what `nvidia-smi` says, on a machine with some.

    python -m benchmarks.devices          (make check-device)

Needs an NVIDIA driver, and of packages pydantic, psutil and nvidia-ml-py alone. Prints JSON: every
comparison, and how long a look takes and holds up the event loop. Ends with 1 if one is wrong.

    fields      each value of each card against `nvidia-smi --query-gpu`
    engine      a process of ours, spawned and recorded as the agent does it, takes 512 MiB of the
                first card by libcuda: its memory and its instance are shown, and gone after it
    driver      who asks NVML is stopped, then crashes: cards stay listed, unwell, and recover
"""

import asyncio
import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from gpustack.lib import platform
from gpustack.schemas.workers import Device
from gpustack.worker.detectors.detection import Detection
from gpustack.worker.detectors.nvidia import Nvidia
from gpustack.worker.device_processes import owners
from gpustack.worker.supervisor.records import Record, Records

MIB = 1 << 20
TAKEN = 512 * MIB
INSTANCE = 7
#: Seconds: of a look, and of waiting for the driver to notice a change.
LIMIT_S, NOTICE_S = 10.0, 30.0

#: Of `nvidia-smi --query-gpu`: our value of a device, and how far apart two looks may be.
FIELDS: dict[str, tuple[Callable[[Device], Any], float]] = {
    "index": (lambda device: device.index, 0),
    "uuid": (lambda device: device.uuid, 0),
    "name": (lambda device: device.name, 0),
    "memory.total": (lambda device: device.memory_total_bytes // MIB, 1),
    "memory.used": (lambda device: device.memory_used_bytes // MIB, 64),
    "utilization.gpu": (lambda device: device.utilization_percent, 30),
    "temperature.gpu": (lambda device: device.temperature_celsius, 5),
    "power.draw": (lambda device: device.power_watts, 60),
    "driver_version": (lambda device: device.driver_version, 0),
    "compute_cap": (lambda device: device.compute_capability, 0),
}

ENGINE = f"""
import ctypes, sys
cuda = ctypes.CDLL("libcuda.so.1")
device, context, memory = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
def check(name, code):
    if code:
        sys.exit(f"{{name}} failed with {{code}}")
check("cuInit", cuda.cuInit(0))
check("cuDeviceGet", cuda.cuDeviceGet(ctypes.byref(device), 0))
check("cuCtxCreate", cuda.cuCtxCreate_v2(ctypes.byref(context), 0, device))
check("cuMemAlloc", cuda.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t({TAKEN})))
print("ready", flush=True)
sys.stdin.read()
"""


class Report:
    """What was compared."""

    def __init__(self) -> None:
        self.checks: list[dict[str, Any]] = []
        self.figures: dict[str, Any] = {}

    def check(self, what: str, ours: Any, theirs: Any, *, is_right: bool) -> None:
        row = {"check": what, "ours": ours, "expected": theirs, "right": is_right}
        self.checks.append(row)
        if not is_right:
            print(f"WRONG: {what}: {ours!r}, expected {theirs!r}", file=sys.stderr)

    @property
    def is_right(self) -> bool:
        return all(check["right"] for check in self.checks)


def smi(*arguments: str) -> str:
    argv = ["nvidia-smi", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return done.stdout


def compare(report: Report, devices: list[Device]) -> None:
    """Every field of every card that is not split."""
    query = smi(f"--query-gpu={','.join(FIELDS)},mig.mode.current", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in row] for row in csv.reader(query.splitlines())]
    by_uuid = {device.uuid: device for device in devices}
    whole = [row for row in rows if row[-1] != "Enabled"]
    listed = sorted(row[1] for row in whole) + sorted(re.findall(r"UUID: (MIG-[^)]+)", smi("-L")))
    report.check(
        "uuids", sorted(by_uuid), sorted(listed), is_right=sorted(by_uuid) == sorted(listed)
    )
    cuda = re.search(r"CUDA Version: *([0-9.]+)", smi())
    for row in whole:
        if (device := by_uuid.get(row[1])) is None:
            continue
        for (name, (ours, apart)), text in zip(FIELDS.items(), row, strict=False):
            value = ours(device)
            report.check(f"{row[1]} {name}", value, text, is_right=_close(value, text, apart))
        if cuda is not None:
            ours_cuda = device.runtime_version
            report.check(f"{row[1]} cuda", ours_cuda, cuda[1], is_right=ours_cuda == cuda[1])


def _close(ours: Any, text: str, apart: float) -> bool:
    if text in ("[N/A]", "N/A", "[Not Supported]"):
        return ours is None or ours == ""
    if isinstance(ours, str):
        return ours == text
    return ours is not None and abs(float(ours) - float(text)) <= apart


@asynccontextmanager
async def engine(records: Records, device: Device) -> AsyncIterator[int]:
    """Pid of a process that took memory of the device, with a record as the agent writes it."""
    record = Record(
        uid="check", instance_id=INSTANCE, instance_name="check-abcde", generation=1, port=1,
        secret_file="", log_file="", argv=[], health_path="/health", boot_id=platform.boot_id(),
    )  # fmt: skip
    records.put(record)
    mark = records.environment(record.uid) | {"CUDA_VISIBLE_DEVICES": device.uuid}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ENGINE, env=os.environ | mark, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    ticks = platform.start_ticks(process.pid)
    records.put(record.model_copy(update={"pid": process.pid, "start_ticks": ticks}))
    try:
        if process.stdout is None or await process.stdout.readline() != b"ready\n":
            raise SystemExit("the process that was to take memory could not: see above")
        yield process.pid
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def look_at_engine(report: Report, detection: Detection, records: Records) -> None:
    before = (await detection.look()).gpu_devices[0]
    async with engine(records, before) as pid:
        device = await _until(
            detection, lambda device: any(each.pid == pid for each in device.processes)
        )
        ours = next((each for each in device.processes if each.pid == pid), None)
        named = [each.model_dump() for each in device.processes]
        report.check("engine is named", named, f"pid {pid}", is_right=ours is not None)
        if ours is not None:
            taken = ours.memory_bytes or 0
            report.check("engine's memory", taken, f">= {TAKEN}", is_right=taken >= TAKEN)
            owner = ours.instance_id
            report.check("engine's instance", owner, INSTANCE, is_right=owner == INSTANCE)
        grown = device.memory_used_bytes - before.memory_used_bytes
        report.check("memory used grows", grown, f">= {TAKEN}", is_right=grown >= TAKEN)
        apps = smi("--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits")
        report.figures["nvidia-smi names"] = apps.splitlines()
    device = await _until(
        detection, lambda device: all(each.pid != pid for each in device.processes)
    )
    left = [each.pid for each in device.processes]
    report.check("engine is gone", left, f"not {pid}", is_right=pid not in left)


async def _until(detection: Detection, is_so: Callable[[Device], bool]) -> Device:
    """The first card once it is so; as it is at the end of our patience."""
    deadline = time.monotonic() + NOTICE_S
    while True:
        device = (await detection.look()).gpu_devices[0]
        if is_so(device) or time.monotonic() > deadline:
            return device
        await asyncio.sleep(0.5)


async def disturb(report: Report, detection: Detection) -> None:
    """Stop, then crash, who asks NVML."""
    for sign, code in ((signal.SIGSTOP, "tool"), (signal.SIGSEGV, "tool")):
        (asking,) = psutil.Process().children()
        asking.send_signal(sign)
        device = (await detection.look()).gpu_devices[0]
        codes = [problem.code.value for problem in device.problems]
        report.check(f"card after {sign.name}", codes, [code], is_right=codes == [code])
        codes = [one.code.value for one in (await detection.look()).gpu_devices[0].problems]
        report.check(f"card one look after {sign.name}", codes, [], is_right=not codes)


async def stall(report: Report, detection: Detection) -> None:
    """How long looks take, and the longest that the loop had to wait meanwhile."""
    longest, took = 0.0, []

    async def watch() -> None:
        nonlocal longest
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - began - 0.001)

    async with asyncio.TaskGroup() as group:
        watching = group.create_task(watch())
        for _ in range(10):
            began = time.perf_counter()
            await detection.look()
            took.append(round(time.perf_counter() - began, 4))
        watching.cancel()
    report.figures |= {"looks, s": took, "longest stall of the loop, s": round(longest, 4)}
    (asking,) = psutil.Process().children()
    report.figures["memory of who asks NVML, MB"] = round(asking.memory_info().rss / 1e6, 1)
    report.figures["memory of this process, MB"] = round(
        psutil.Process().memory_info().rss / 1e6, 1
    )
    report.check("longest stall", longest, "<= 0.05", is_right=longest <= 0.05)


async def main() -> int:
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "engines").mkdir()
        records = Records(Path(folder))
        detection = Detection(
            [Nvidia()], owners=partial(owners, records), limit_s=LIMIT_S, patience_s=2 * LIMIT_S
        )
        try:
            devices = (await detection.look()).gpu_devices
            report.figures["devices"] = [device.model_dump(mode="json") for device in devices]
            report.figures["sees all processes"] = platform.sees_all_processes()
            report.check("there is a card", len(devices), ">= 1", is_right=bool(devices))
            if devices:
                compare(report, devices)
                await look_at_engine(report, detection, records)
                await stall(report, detection)
                await disturb(report, detection)
        finally:
            detection.close()
    print(
        json.dumps({"right": report.is_right, **report.figures, "checks": report.checks}, indent=1)
    )
    return 0 if report.is_right else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
