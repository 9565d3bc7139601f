"""Heat has to last to make a device unwell, whoever's it is."""

from collections.abc import Iterator

from gpustack.schemas.workers import Device, DeviceProblem, ProblemCode
from gpustack.worker.detectors.heat import COOL_AFTER_S, HOT_AFTER_S, Heats, steadied

ECC = DeviceProblem(code=ProblemCode.ECC, message="2 memory errors")


def hot(degrees: int) -> DeviceProblem:
    return DeviceProblem(code=ProblemCode.THERMAL, message=f"it is {degrees} °C hot")


def device(index: int = 0, *problems: DeviceProblem, uuid: str = "") -> Device:
    return Device(
        index=index, vendor="v", type="t", uuid=uuid, memory_total_bytes=1, problems=[*problems]
    )


def looks(*found: list[Device], every_s: float = 10.0) -> Iterator[list[Device]]:
    heats: Heats = {}
    for at, each in enumerate(found):
        devices, heats = steadied(heats, each, at * every_s)
        yield devices


def seen(*slowed: bool) -> list[bool]:
    """Whether a device is too hot after each look."""
    found = [[device(0, *[hot(90)] * is_slowed)] for is_slowed in slowed]
    return [bool(one.problems) for (one,) in looks(*found)]


def test_heat_has_to_last_to_make_a_device_unwell_and_coolness_longer_to_make_it_well() -> None:
    assert seen(True, True, True, True) == [False, False, False, True]
    assert not any(seen(True, False, False, False, True, True, True))
    # What comes and goes is heat all the same.
    assert seen(*(True, False) * 3)[4]
    cool = seen(*[True] * 4, *[False] * 31)
    assert cool.index(False, 3) == 3 + COOL_AFTER_S / 10
    assert HOT_AFTER_S < COOL_AFTER_S


def test_the_degrees_of_each_look_are_no_news() -> None:
    told = [one.problems for (one,) in looks(*([device(0, hot(90 + at))] for at in range(9)))]
    assert told == [[]] * 3 + [[hot(90)]] * 6


def test_what_else_is_wrong_is_told_at_once_and_stays() -> None:
    first, *_, last = looks(*[[device(0, hot(90), ECC)]] * 4)
    assert (first[0].problems, last[0].problems) == ([ECC], [ECC, hot(90)])


def test_heat_is_of_its_device_alone_also_when_its_index_changes() -> None:
    found = [[device(at % 2, hot(90), uuid="a"), device(1 - at % 2, uuid="b")] for at in range(4)]
    *_, last = looks(*found)
    assert {one.uuid: len(one.problems) for one in last} == {"a": 1, "b": 0}
