"""NVIDIA cards and their MIG instances, by NVML."""

import logging
from collections.abc import Iterator
from typing import Any, Final, TypeVar

from gpustack.schemas.workers import Device, DeviceProblem, DeviceProcess, ProblemCode
from gpustack.worker.detectors import host, nvml
from gpustack.worker.detectors.nvidia_health import Health, xid_said
from gpustack.worker.detectors.nvml import (
    GPU_IS_LOST,
    NO_PERMISSION,
    NOT_SUPPORTED,
    Card,
    Memory,
    MigInstance,
    Process,
    Reading,
    Refusal,
)
from gpustack.worker.detectors.tools import Tools

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: nvml.h, nvmlDeviceArchitecture_t.
_ARCHITECTURES: Final = {
    2: "Kepler",
    3: "Maxwell",
    4: "Pascal",
    5: "Volta",
    6: "Turing",
    7: "Ampere",
    8: "Ada Lovelace",
    9: "Hopper",
    10: "Blackwell",
    13: "Rubin",
}

#: MIG instances of card N have the indexes from 100 * (N + 1) on: never a card's, and the same ones
#: whatever is done to other cards. A card has 7 at most, a machine 16 cards.
_MIG_INDEXES: Final = 100

_NONE: Final = Memory(total=0, used=0)


class Nvidia:
    """The detector, which remembers what happened to the cards."""

    vendor = "NVIDIA"

    def __init__(self) -> None:
        self._health = Health()

    def look(self, tools: Tools) -> list[Device]:
        reading = nvml.read(tools)
        if reading is None:
            return []
        for xid in dict.fromkeys(self._health.hear(reading.xids)):  # some come by the hundred
            logger.info("%s", xid_said(xid))
        return list(devices(reading, self._health, host.memory()))


def devices(reading: Reading, health: Health, host_memory: tuple[int, int]) -> Iterator[Device]:
    """The devices that engines can use. Pure.

    A card that is split into MIG instances is not among them, its instances are.

    Args:
        host_memory: total and used, bytes: a card that shares it has none of its own.
    """
    shared: dict[str, Any] = {
        "vendor": Nvidia.vendor,
        "type": "cuda",
        "driver_version": _or(reading.driver, ""),
        "runtime_version": _cuda(reading.cuda),
    }
    for card in reading.cards:
        if not isinstance(card, Card):
            if card.silent.refused != NO_PERMISSION:  # it was given to another container
                yield _silent(card.index, card.silent, shared)
            continue
        own = shared | {
            "architecture": _ARCHITECTURES.get(_or(card.architecture, 0), ""),
            "compute_capability": ".".join(str(part) for part in _or(card.capability, ())),
        }
        if (lost := _lost(card.uuid, card.memory)) is not None:
            yield _silent(card.index, lost, shared)
        elif card.mig:
            yield from (_instance(card, part, health, own) for part in card.mig)
        else:
            yield _card(card, health, host_memory, own)


def _card(
    card: Card, health: Health, host_memory: tuple[int, int], shared: dict[str, Any]
) -> Device:
    memory, is_unified = card.memory, False
    if isinstance(memory, Refusal) and memory.refused == NOT_SUPPORTED:
        # Grace, Jetson and GB10: https://docs.nvidia.com/dgx/dgx-spark/known-issues.html says that
        # nvidia-smi shows "Memory-Usage: Not Supported" there.
        memory, is_unified = Memory(total=host_memory[0], used=host_memory[1]), True
    problems = health.problems(card)
    if card.mig is not None:
        problems.append(
            DeviceProblem(
                code=ProblemCode.REPORTED,
                message="MIG is on and it has no instance: make some with `nvidia-smi mig -cgi`, "
                "or turn MIG off",
            )
        )
    power = _or(card.power_milliwatts, None)
    return Device(
        index=card.index,
        name=_or(card.name, ""),
        uuid=_or(card.uuid, ""),
        memory_total_bytes=_or(memory, _NONE).total,
        memory_used_bytes=_or(memory, _NONE).used,
        memory_unified=is_unified,
        utilization_percent=_number(card.utilization_percent),
        temperature_celsius=_number(card.temperature_celsius),
        power_watts=None if power is None else power / 1000,
        problems=problems,
        processes=_processes(card.processes),
        **shared,
    )


def _instance(card: Card, part: MigInstance, health: Health, shared: dict[str, Any]) -> Device:
    """A MIG instance; what NVML tells of cards alone is the card's."""
    memory = _or(part.memory, _NONE)
    return Device(
        index=_MIG_INDEXES * (card.index + 1) + part.position,
        name=_or(part.name, ""),
        uuid=_or(part.uuid, ""),
        parent_uuid=_or(card.uuid, ""),
        memory_total_bytes=memory.total,
        memory_used_bytes=memory.used,
        temperature_celsius=_number(card.temperature_celsius),
        problems=health.problems(card, part),
        processes=_processes(part.processes),
        **shared,
    )


def _silent(index: int, refusal: Refusal, shared: dict[str, Any]) -> Device:
    """A card that NVML counts and that does not answer: what was known of it stays."""
    code = ProblemCode.LOST if refusal.refused == GPU_IS_LOST else ProblemCode.TOOL
    problem = DeviceProblem(code=code, message=f"NVML: {refusal.text or refusal.refused}")
    return Device(index=index, memory_total_bytes=0, problems=[problem], **shared)


def _lost(*said: object) -> Refusal | None:
    for one in said:
        if isinstance(one, Refusal) and one.refused == GPU_IS_LOST:
            return one
    return None


def _processes(said: tuple[Process, ...] | Refusal) -> list[DeviceProcess]:
    return [DeviceProcess(pid=one.pid, memory_bytes=one.memory) for one in _or(said, ())]


def _cuda(said: int | Refusal) -> str:
    return "" if isinstance(said, Refusal) else f"{said // 1000}.{said % 1000 // 10}"


def _number(said: int | Refusal) -> float | None:
    return None if isinstance(said, Refusal) else float(said)


def _or(said: T | Refusal, otherwise: T) -> T:
    return otherwise if isinstance(said, Refusal) else said
