"""Whatever a tool prints costs a ToolFailed or a ValueError, or gives devices that can be used."""

from collections.abc import Callable, Sequence
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpustack.schemas.workers import Device, DeviceNetwork
from gpustack.worker.detectors import (
    amd,
    apple,
    ascend,
    cambricon,
    hygon,
    iluvatar,
    moore_threads,
)
from tests.worker.detectors.recordings import recorded

Parser = Callable[[str], Sequence[Device]]

STATIC: Final = recorded("amd/rocm6-static.json")
METRIC: Final = recorded("amd/rocm6-metric.json")
LISTING: Final = '[{"gpu": 0, "hip_id": 0, "node_id": 1, "uuid": "b5ff"}]'
TABLE: Final = recorded("ascend/310-21.0.4.txt")


def chips(table: str, mapping: str) -> list[Device]:
    return [chip.device for chip in ascend.parse(table, mapping).values()]


#: Each recording with the parser that reads it, the other outputs being whole.
READERS: Final[dict[str, Parser]] = {
    "amd/rocm6-static.json": lambda output: amd.parse("", output, METRIC),
    "amd/rocm6-metric.json": lambda output: amd.parse("", STATIC, output),
    "amd/rocm7-metric.json": lambda output: amd.parse(LISTING, STATIC, output),
    "amd/static-asic.json": lambda output: amd.parse("", output, METRIC),
    "amd/rocm-smi-7900xt.json": amd.parse_rocm_smi,
    "amd/rocm-smi-7800xt.json": amd.parse_rocm_smi,
    "amd/rocm-smi-6600-allinfo.json": amd.parse_rocm_smi,
    "ascend/910b4-24.1.1.txt": lambda output: chips(output, ""),
    "ascend/310p-duo-25.2.0.txt": lambda output: chips(output, ""),
    "ascend/910-a3-25.3.rc1.txt": lambda output: chips(
        output, recorded("ascend/910-a3-mapping.txt")
    ),
    "ascend/950pr-25.7.rc1.6.txt": lambda output: chips(output, recorded("ascend/950-mapping.txt")),
    "ascend/310-21.0.4.txt": lambda output: chips(
        output, recorded("ascend/310-21.0.4-mapping.txt")
    ),
    "ascend/910-24.1.RC2.txt": lambda output: chips(output, ""),
    "ascend/310-21.0.4-mapping.txt": lambda output: chips(TABLE, output),
    "ascend/910-a3-mapping.txt": lambda output: chips(TABLE, output),
    "ascend/950-mapping.txt": lambda output: chips(TABLE, output),
    "hygon/k100-ai.json": hygon.parse,
    "hygon/dcu-24.04.3.json": hygon.parse,
    "moore_threads/s5000.json": moore_threads.parse,
    "moore_threads/s80-1.14.0.txt": moore_threads.parse_table,
    "moore_threads/s5000-2.3.2.txt": moore_threads.parse_table,
    "iluvatar/mr-v100-4.2.0.xml": iluvatar.parse,
    "iluvatar/bi-v150-4.3.0.txt": iluvatar.parse_table,
    "iluvatar/mr-v100-duo-4.4.0.txt": iluvatar.parse_table,
    "cambricon/mlu370-x4-4.20.11.txt": cambricon.parse,
    "cambricon/mlu370-x8-5.10.13.txt": cambricon.parse,
    "apple/m2-pro.json": lambda output: apple.parse(output, used_bytes=1 << 30),
    "apple/intel-imac.json": lambda output: apple.parse(output, used_bytes=1 << 30),
}

#: What a broken tool, another language or another version puts where a value was.
INTRUDERS: Final = (
    "N/A",
    "-",
    "",
    "ERR!",
    "未知",
    "-1",
    "1e999",
    "NaN",
    "9" * 5000,
    '"',
    "{}",
    "|",
)


@st.composite
def garbled(draw: st.DrawFn, output: str) -> str:
    """The output, cut, with lines gone or doubled, bytes flipped, or values replaced."""
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(output) - 1, 0)))
        match draw(st.sampled_from(["cut", "tail", "drop", "double", "swap", "flip", "value"])):
            case "cut":
                output = output[:place]
            case "tail":
                output = output[place:]
            case "flip":
                raw = bytearray(output.encode())
                if raw:
                    raw[place % len(raw)] ^= draw(st.integers(1, 255))
                output = raw.decode(errors="replace")
            case "value":
                intruder = draw(st.sampled_from(INTRUDERS))
                output = output[:place] + intruder + output[place + draw(st.integers(0, 9)) :]
            case how:
                lines = output.splitlines(keepends=True)
                if len(lines) > 1:
                    line = draw(st.integers(0, len(lines) - 2))
                    if how == "drop":
                        del lines[line]
                    elif how == "double":
                        lines.insert(line, lines[line])
                    else:
                        lines[line], lines[line + 1] = lines[line + 1], lines[line]
                output = "".join(lines)
    return output


def usable(devices: Sequence[Device]) -> bool:
    indexes = [device.index for device in devices]
    return len(set(indexes)) == len(indexes) and all(
        device.index >= 0
        and 0 <= device.memory_used_bytes < 1 << 51
        and 0 <= device.memory_total_bytes < 1 << 51
        and (device.memory_total_bytes > 0 or device.problems)
        for device in devices
    )


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=25)
@given(data=st.data())
def test_a_garbled_output_costs_a_value_error_at_most(name: str, data: st.DataObject) -> None:
    output = data.draw(garbled(recorded(name)))
    try:
        devices = READERS[name](output)
    except ValueError:
        return
    assert usable(devices), devices


@settings(max_examples=50)
@given(data=st.data())
def test_a_garbled_network_or_board_is_an_empty_one_at_most(data: st.DataObject) -> None:
    answers = "".join(recorded(f"ascend/hccn-{what}.txt") for what in ("link", "ip", "mtu"))
    network = ascend.parse_network(data.draw(garbled(answers)))
    assert isinstance(network, DeviceNetwork)
    assert network.mtu is None or network.mtu >= 0
    assert len(ascend.parse_uuid(data.draw(garbled(recorded("ascend/board.txt"))))) <= 200


@pytest.mark.parametrize("name", READERS)
def test_every_recording_gives_devices_that_can_be_used(name: str) -> None:
    devices = READERS[name](recorded(name))
    assert usable(devices)
    assert devices or name == "apple/intel-imac.json"
