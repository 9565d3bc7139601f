"""When a device is too hot, without flapping. Pure: time is an argument.

Detectors say whether the hardware slows a device down for heat at this moment. That comes and goes
with each request; a device is unwell once it lasts.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from gpustack.schemas.workers import Device, DeviceProblem, ProblemCode

#: Seconds that a device has to be slowed down, to be unwell. With looks every 10 s: four in a row.
HOT_AFTER_S: Final = 30.0
#: Seconds without, after which being slowed down counts from the beginning.
GAP_S: Final = 30.0
#: Seconds without, after which it is well again. A device that is given new work at once would get
#: hot again, so this is much longer than what made it unwell.
COOL_AFTER_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Heat:
    """How hot one device was lately.

    Attributes:
        problem: what its detector said when it began to be slowed down. What it says now may have
            the degrees of now in it, and would be news at each look.
        since: when that was; None: it is not slowed down.
        last: when it was seen slowed down last.
        is_hot: it is unwell.
    """

    problem: DeviceProblem
    since: float | None
    last: float
    is_hot: bool = False

    def after(self, *, is_slowed: bool, now: float) -> "Heat":
        """What is known after one more look.

        Args:
            now: seconds, of a clock that never goes back.
        """
        if is_slowed:
            began = now if self.since is None else self.since
            return Heat(self.problem, began, now, self.is_hot or now - began >= HOT_AFTER_S)
        cool_s = now - self.last
        since = None if cool_s >= GAP_S else self.since
        return Heat(self.problem, since, self.last, self.is_hot and cool_s < COOL_AFTER_S)


#: By device: UUID, or where it has none its type and index.
Heats = Mapping[str, Heat]


def steadied(heats: Heats, found: Iterable[Device], now: float) -> tuple[list[Device], Heats]:
    """The devices, with the problem `thermal` where heat lasts and without it elsewhere.

    Also what is to be remembered until the next look.
    """
    devices = []
    after: dict[str, Heat] = {}
    for device in found:
        key = device.uuid or f"{device.type}:{device.index}"
        said = next((one for one in device.problems if one.code is ProblemCode.THERMAL), None)
        heat = heats.get(key)
        if heat is None and said is not None:
            heat = Heat(said, now, now)
        if heat is not None:
            heat = heat.after(is_slowed=said is not None, now=now)
            if heat.is_hot or heat.since is not None:
                after[key] = heat
            others = [one for one in device.problems if one is not said]
            problems = [*others, heat.problem] if heat.is_hot else others
            device = device.model_copy(update={"problems": problems})
        devices.append(device)
    return devices, after
