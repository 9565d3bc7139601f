"""A program: for each line on its standard input one JSON line with what NVML says.

A process of its own, since NVML has crashed who calls it and hung when a card was lost: then this
process ends, or is ended, and not the agent. It stays, since opening NVML wakes up cards that no
driver keeps awake, which takes seconds for each, and Xid errors are told to those alone who hold
it open. Imports nothing of ours: it takes 17 MB, and only where there is an NVIDIA driver.

An answer is what `nvml.Answer` describes. A value that NVML refuses is `{"refused": code,
"text": …}`. Nothing is decided here.
"""

import ctypes
import json
import sys
from collections.abc import Callable
from typing import Any, Final

import pynvml as nvml

#: Events that are read at one look; more wait for the next.
_EVENTS: Final = 1000

#: How NVML says that an event is of no MIG instance (nvml.h, nvmlEventData_t).
_NO_INSTANCE: Final = 0xFFFFFFFF

_XID: Final = nvml.nvmlEventTypeXidCriticalError

Json = dict[str, Any]


class _Library:
    """NVML, opened when it is needed and as long as it works."""

    def __init__(self) -> None:
        self._is_open = False
        self._events: Any = None
        self._heard: dict[int, str] = {}  # card's handle -> UUID

    def answer(self) -> Json:
        try:
            if not self._is_open:
                self._open()
            return {
                "driver": _ask(nvml.nvmlSystemGetDriverVersion),
                "cuda": _ask(nvml.nvmlSystemGetCudaDriverVersion_v2),
                "cards": [self._card(index) for index in range(nvml.nvmlDeviceGetCount())],
                "xids": self._xids(),
            }
        except nvml.NVMLError as error:
            self._close()
            return _refusal(error)

    def _open(self) -> None:
        nvml.nvmlInit()
        self._is_open = True
        events = _ask(nvml.nvmlEventSetCreate)
        self._events = None if _is_refusal(events) else events

    def _close(self) -> None:
        if self._events is not None:
            _ask(nvml.nvmlEventSetFree, self._events)
        if self._is_open:
            _ask(nvml.nvmlShutdown)
        self._is_open, self._events, self._heard = False, None, {}

    def _card(self, index: int) -> Json:
        handle = _ask(nvml.nvmlDeviceGetHandleByIndex, index)
        if _is_refusal(handle):
            return {"index": index, "silent": handle}
        uuid = _ask(nvml.nvmlDeviceGetUUID, handle)
        if isinstance(uuid, str):
            self._listen(handle, uuid)
        slowdowns = _ask(nvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
        if _is_refusal(slowdowns):  # drivers before 535
            slowdowns = _ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
        ecc = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        return {
            "index": index,
            "uuid": uuid,
            "name": _ask(nvml.nvmlDeviceGetName, handle),
            "memory": _memory(handle),
            "utilization_percent": _ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            "temperature_celsius": _ask(
                nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU
            ),
            "power_milliwatts": _ask(nvml.nvmlDeviceGetPowerUsage, handle),
            "architecture": _ask(nvml.nvmlDeviceGetArchitecture, handle),
            "capability": _ask(nvml.nvmlDeviceGetCudaComputeCapability, handle),
            "slowdowns": slowdowns,
            "ecc_uncorrected": _ask(nvml.nvmlDeviceGetTotalEccErrors, handle, *ecc),
            "remapped": _ask(nvml.nvmlDeviceGetRemappedRows, handle),
            "processes": _processes(handle),
            "mig": _mig(handle),
        }

    def _listen(self, handle: Any, uuid: str) -> None:
        """Have Xid errors of the card told, if it can tell them."""
        address = _address(handle)
        if self._events is None or address in self._heard:
            return
        self._heard[address] = uuid
        supported = _ask(nvml.nvmlDeviceGetSupportedEventTypes, handle)
        if isinstance(supported, int) and supported & _XID:
            _ask(nvml.nvmlDeviceRegisterEvents, handle, _XID, self._events)

    def _xids(self) -> list[Json]:
        found: list[Json] = []
        while self._events is not None and len(found) < _EVENTS:
            event = _ask(nvml.nvmlEventSetWait_v2, self._events, 0)
            if _is_refusal(event):  # none is left
                break
            if event.eventType == _XID:
                found.append(
                    {
                        "card": self._heard.get(_address(event.device), ""),
                        "code": int(event.eventData),
                        "gpu_instance": _instance(event.gpuInstanceId),
                        "compute_instance": _instance(event.computeInstanceId),
                    }
                )
        return found


def _ask(call: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns, or how NVML refused."""
    try:
        return call(*arguments)
    except nvml.NVMLError as error:
        return _refusal(error)


def _refusal(error: nvml.NVMLError) -> Json:
    return {"refused": int(error.value), "text": str(error)}


def _is_refusal(said: Any) -> bool:
    return isinstance(said, dict)


def _address(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def _instance(number: int) -> int | None:
    return None if number == _NO_INSTANCE else int(number)


def _memory(handle: Any) -> Json:
    said = _ask(nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)
    if _is_refusal(said):  # drivers before 510
        said = _ask(nvml.nvmlDeviceGetMemoryInfo, handle)
    return said if _is_refusal(said) else {"total": int(said.total), "used": int(said.used)}


def _processes(handle: Any) -> Any:
    """Those that compute, also as clients of NVIDIA's multi-process service."""
    own = _ask(nvml.nvmlDeviceGetComputeRunningProcesses_v3, handle)
    if _is_refusal(own):  # drivers before 510
        own = _ask(nvml.nvmlDeviceGetComputeRunningProcesses_v2, handle)
    if _is_refusal(own):
        return own
    shared = _ask(nvml.nvmlDeviceGetMPSComputeRunningProcesses_v3, handle)
    told = {int(one.pid): one.usedGpuMemory for one in own}
    if not _is_refusal(shared):
        told |= {int(one.pid): one.usedGpuMemory for one in shared}
    return [{"pid": pid, "memory": memory} for pid, memory in sorted(told.items())]


def _mig(handle: Any) -> list[Json] | None:
    mode = _ask(nvml.nvmlDeviceGetMigMode, handle)
    if _is_refusal(mode) or not mode[0]:
        return None
    places = _ask(nvml.nvmlDeviceGetMaxMigDeviceCount, handle)
    found = []
    for position in range(0 if _is_refusal(places) else places):
        part = _ask(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, position)
        if _is_refusal(part):  # this place is free
            continue
        found.append(
            {
                "position": position,
                "uuid": _ask(nvml.nvmlDeviceGetUUID, part),
                "name": _ask(nvml.nvmlDeviceGetName, part),
                "memory": _memory(part),
                "gpu_instance": _ask(nvml.nvmlDeviceGetGpuInstanceId, part),
                "compute_instance": _ask(nvml.nvmlDeviceGetComputeInstanceId, part),
                "processes": _processes(part),
            }
        )
    return found


def main() -> None:
    library = _Library()
    for _ in sys.stdin:
        sys.stdout.write(json.dumps(library.answer()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
