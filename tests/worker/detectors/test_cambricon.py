import pytest

from gpustack.worker.detectors.cambricon import Cambricon, parse
from tests.worker.detectors.recordings import Machine, recorded

MIB = 1 << 20


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "cambricon/mlu370-x8-5.10.13.txt",
            ("MLU370-X8", "v5.10.13", 23374 * MIB, 39.0, 106.0),
        ),
        (
            "cambricon/mlu370-x4-4.20.11.txt",
            ("MLU370-X4", "v4.20.11", 23308 * MIB, 33.0, 25.0),
        ),
    ],
)
def test_the_table_of_cnmon_is_read(
    name: str, expected: tuple[str, str, int, float, float]
) -> None:
    first, second = parse(recorded(name))
    assert (first.index, second.index) == (0, 1)
    assert (
        second.name,
        second.driver_version,
        second.memory_total_bytes,
        second.temperature_celsius,
        second.power_watts,
    ) == expected
    assert (second.type, second.memory_used_bytes, second.utilization_percent) == ("mlu", 0, 0.0)


def test_cnmon_is_run(machine: Machine) -> None:
    assert Cambricon().look(machine.tools()) == []
    machine.install("cnmon", {"": "cambricon/mlu370-x8-5.10.13.txt"})
    assert len(Cambricon().look(machine.tools())) == 2


def test_a_command_line_that_looks_like_a_card_is_none() -> None:
    output = recorded("cambricon/mlu370-x8-5.10.13.txt")
    card = output[output.index("| 0     /") : output.index("| 1     /")]
    assert parse(output + card.replace("| 0 ", "| 7 ")) == parse(output)


def test_what_is_no_table_is_told() -> None:
    with pytest.raises(ValueError, match="no table of cards, but 'Unable to determine the device"):
        parse("[1] CNDEV error\nUnable to determine the device handle\n")
