"""When an NVIDIA card is not well, and why. Pure.

Source of the Xid tables: NVIDIA, "Xid Errors", chapter "Analyzing Xid Errors with the Xid Catalog",
https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html, column "Resolution Bucket
(Immediate Action)".
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from gpustack.schemas.workers import DeviceProblem, ProblemCode
from gpustack.worker.detectors.nvml import Card, MigInstance, Xid

_RESET: Final = "the card has to be reset"
_REBOOT: Final = "the machine has to be rebooted"
_REPAIR: Final = "NVIDIA's debug guidelines say what to check"

#: Errors after which the card serves nobody before somebody acts: meaning, and what to do.
#: RESET_GPU, RESTART_BM, RESTART_VM and the workflows of 48 and 74 in the catalogue.
XIDS: Final[Mapping[int, tuple[str, str]]] = {
    46: ("the card stopped processing", _RESET),
    48: ("a memory error of two bits", _RESET),
    62: ("its controller halted", _RESET),
    64: ("a row of its memory could not be remapped", _RESET),
    74: ("an NVLink error", _REPAIR),
    79: ("the card has fallen off the bus", _REBOOT),
    95: ("a memory error that was not contained", _RESET),
    109: ("a context switch timed out", _RESET),
    110: ("a security fault", _RESET),
    119: ("its system processor does not answer", _RESET),
    120: ("its system processor failed", _RESET),
    136: ("a link could not be trained", _RESET),
    140: ("a memory error that could not be corrected", _RESET),
    143: ("the card could not be initialised", _RESET),
    151: ("a key could not be rotated", _REBOOT),
    155: ("an NVLink error", _RESET),
    156: ("a part of the card was retired", _RESET),
    158: ("the card timed out", _RESET),
}

#: Errors that a program makes, or that end with it: RESTART_APP in the catalogue. 45 follows
#: whatever ended a program. With MIG or not, the card goes on.
PROGRAMS_FAULT: Final[frozenset[int]] = frozenset(
    {8, 11, 13, 31, 32, 37, 39, 40, 41, 43, 44, 45, 60, 68, 69, 70, 71, 72, 75, 76, 77, 80}
    | {82, 83, 84, 85, 86, 88, 89, 94, *range(96, 106), *range(126, 136), 139}
)

#: nvml.h: nvmlClocksEventReasonHwThermalSlowdown. Clocks are halved at least.
HW_THERMAL_SLOWDOWN: Final = 0x40


@dataclass
class Health:
    """What has happened to the cards while this agent ran.

    An Xid error stays until the agent is restarted: nothing tells that a card was reset, and a
    reset needs the agent to be stopped. Everything else is read anew at each look, and ends when
    the driver says so: counters of memory errors are 0 after a reset or a reboot.
    """

    xids: dict[str, list[Xid]] = field(default_factory=dict)

    def hear(self, xids: Iterable[Xid]) -> list[Xid]:
        """Take in what was reported; those that make no card unwell are returned.

        Among them is one whose card is not told: it had gone before it was ever read.
        """
        harmless = []
        for xid in xids:
            if xid.code not in XIDS or not xid.card:
                harmless.append(xid)
            elif xid not in (known := self.xids.setdefault(xid.card, [])):
                known.append(xid)
        return harmless

    def problems(self, card: Card, part: MigInstance | None = None) -> list[DeviceProblem]:
        """What is wrong with a card now, or with a MIG instance of it."""
        uuid = card.uuid if isinstance(card.uuid, str) else ""
        codes = {
            xid.code for xid in self.xids.get(uuid, ()) if part is None or _concerns(xid, part)
        }
        found = [
            _problem(ProblemCode.XID, f"Xid {code}: {XIDS[code][0]}; {XIDS[code][1]}")
            for code in sorted(codes)
        ]
        if isinstance(card.ecc_uncorrected, int) and card.ecc_uncorrected > 0:
            found.append(
                _problem(
                    ProblemCode.ECC,
                    f"{card.ecc_uncorrected} memory errors could not be corrected since the driver "
                    "was loaded; the card has to be reset",
                )
            )
        if isinstance(card.remapped, tuple) and card.remapped[-1]:
            found.append(
                _problem(
                    ProblemCode.ECC,
                    "a row of its memory could not be remapped: NVIDIA replaces such cards",
                )
            )
        if isinstance(card.slowdowns, int) and card.slowdowns & HW_THERMAL_SLOWDOWN:
            found.append(
                _problem(
                    ProblemCode.THERMAL,
                    "it halves its clocks at least, for it is too hot; see to its cooling",
                )
            )
        return found


def xid_said(xid: Xid) -> str:
    """One that makes no card unwell, for the log."""
    whose = "a program's fault" if xid.code in PROGRAMS_FAULT else "of no known consequence"
    if xid.code in XIDS:
        whose = XIDS[xid.code][0]
    return f"{xid.card or 'a card'}: Xid {xid.code}, {whose}"


def _concerns(xid: Xid, part: MigInstance) -> bool:
    """Whether it may be of that instance: one that names none is of all."""
    return xid.gpu_instance in (None, part.gpu_instance) and xid.compute_instance in (
        None,
        part.compute_instance,
    )


def _problem(code: ProblemCode, message: str) -> DeviceProblem:
    return DeviceProblem(code=code, message=message)
