import json

import pytest

from gpustack.schemas.workers import ProblemCode
from gpustack.worker.detectors.amd import Amd, parse, parse_rocm_smi
from gpustack.worker.detectors.tools import ToolFailed
from tests.worker.detectors.recordings import Machine, recorded

MIB = 1 << 20


def listing(*cards: dict[str, object]) -> str:
    """`amd-smi list -e --json` with the fields of AMD's reference; none is public."""
    return json.dumps([{"gpu": gpu, **card} for gpu, card in enumerate(cards)])


def test_amd_smi_of_rocm_6_is_read() -> None:
    (device,) = parse("", recorded("amd/rocm6-static.json"), recorded("amd/rocm6-metric.json"))
    assert device.model_dump(exclude_defaults=True) == {
        "index": 0,
        "name": "Navi 23 [Radeon RX 6600/6600 XT",
        "vendor": "AMD",
        "type": "rocm",
        "memory_total_bytes": 8176 * MIB,
        "memory_used_bytes": 202 * MIB,
        "driver_version": "7.0.0-3-pve",
        "utilization_percent": 1.0,
        "temperature_celsius": 37.0,
        "power_watts": 6.0,
    }


def test_amd_smi_of_rocm_7_is_read_and_a_card_at_its_power_limit_is_well() -> None:
    static = json.dumps({"gpu_data": json.loads(recorded("amd/static-asic.json"))})
    first, second = parse("", static, recorded("amd/rocm7-metric.json"))
    assert (first.name, first.architecture) == ("Granite Ridge [Radeon Graphics]", "gfx1036")
    assert (first.memory_used_bytes, first.memory_total_bytes) == (20450 * MIB, 30576 * MIB)
    assert (first.utilization_percent, first.temperature_celsius) == (91.0, 63.0)
    assert first.problems == []
    assert (second.memory_used_bytes, second.memory_total_bytes) == (57 * MIB, 32624 * MIB)


def test_devices_are_numbered_as_hip_counts_them() -> None:
    metric = recorded("amd/rocm7-metric.json")
    static = recorded("amd/static-asic.json")

    def order(numbers: str) -> list[int]:
        return [device.memory_total_bytes // MIB for device in parse(numbers, static, metric)]

    by_pci, by_hip = [30576, 32624], [32624, 30576]
    assert order("") == by_pci
    assert order(listing({"hip_id": 1}, {"hip_id": 0})) == by_hip
    assert order(listing({"node_id": 3}, {"node_id": 2})) == by_hip
    assert order(listing({"hip_id": "N/A", "node_id": 2}, {"hip_id": 0, "node_id": 3})) == by_pci
    device = parse(listing({"hip_id": 0, "hip_uuid": "GPU-de82", "uuid": "b5ff"}), static, metric)
    assert device[0].uuid == "GPU-de82"


def test_errors_and_heat_that_amd_smi_reports_are_problems() -> None:
    metric = json.loads(recorded("amd/rocm6-metric.json"))
    metric[0]["ecc"]["total_uncorrectable_count"] = 3
    metric[0]["temperature"]["hotspot"]["value"] = 110
    (device,) = parse("", recorded("amd/rocm6-static.json"), json.dumps(metric))
    assert [one.code for one in device.problems] == [ProblemCode.ECC, ProblemCode.THERMAL]
    assert "3 memory errors" in device.problems[0].message
    assert "110 °C" in device.problems[1].message


def test_a_card_that_vanishes_between_two_commands_has_a_problem() -> None:
    static = recorded("amd/rocm6-static.json")
    (device,) = parse("", static, '{"gpu_data": []}')
    assert [one.code for one in device.problems] == [ProblemCode.TOOL]
    assert device.memory_total_bytes == 8176 * MIB


def test_rocm_smi_is_read() -> None:
    (device,) = parse_rocm_smi(recorded("amd/rocm-smi-7800xt.json"))
    assert device.model_dump(exclude_defaults=True) == {
        "index": 0,
        "name": "Navi 32 [Radeon RX 7700 XT / 7800 XT]",
        "vendor": "AMD",
        "type": "rocm",
        "uuid": "0x5c88007d760374f3",
        "memory_total_bytes": 17163091968,
        "memory_used_bytes": 11615076352,
        "architecture": "gfx11001",
        "utilization_percent": 100.0,
        "temperature_celsius": 51.0,
        "power_watts": 53.0,
    }
    assert parse_rocm_smi(recorded("amd/rocm-smi-7900xt.json"))[0].architecture == "gfx1100"


def test_devices_of_rocm_smi_are_numbered_as_hip_counts_them() -> None:
    first = json.loads(recorded("amd/rocm-smi-7900xt.json"))["card0"]
    second = json.loads(recorded("amd/rocm-smi-7800xt.json"))["card0"]
    cards = {"card0": {**first, "Node ID": "2"}, "card1": {**second, "Node ID": "1"}}
    found = parse_rocm_smi(json.dumps(cards))
    assert [one.memory_total_bytes for one in found] == [17163091968, 21458059264]


def test_a_card_whose_memory_nobody_says_has_a_problem() -> None:
    (device,) = parse_rocm_smi(recorded("amd/rocm-smi-6600-allinfo.json"))
    assert (device.memory_total_bytes, device.driver_version) == (0, "7.0.0-3-pve")
    assert [one.code for one in device.problems] == [ProblemCode.TOOL]


def test_rocm_smi_of_hygons_driver_shows_no_card_of_amd() -> None:
    assert parse_rocm_smi(recorded("hygon/k100-ai.json")) == []
    assert parse_rocm_smi("WARNING: No JSON data to report\n") == []


def test_warnings_before_the_json_are_passed_over() -> None:
    warning = "WARNING: User is missing the following required groups: render, video.\n"
    metric = warning + recorded("amd/rocm6-metric.json")
    assert parse("", recorded("amd/rocm6-static.json"), metric)[0].power_watts == 6.0


def test_amd_smi_is_run_and_what_does_not_change_is_asked_once(machine: Machine) -> None:
    machine.install(
        "amd-smi",
        {
            "static *": "amd/rocm6-static.json",
            "metric *": "amd/rocm6-metric.json",
            "list -e *": listing({"hip_id": 2, "hip_uuid": "GPU-de82"}),
        },
    )
    detector = Amd()
    (device,) = detector.look(machine.tools())
    assert (device.index, device.uuid, device.memory_total_bytes) == (2, "GPU-de82", 8176 * MIB)
    assert detector.look(machine.tools()) == [device]
    commands = [call.split()[1] for call in machine.calls]
    assert commands == ["static", "list", "metric", "metric"]


def test_a_card_that_comes_back_is_asked_for_anew_and_keeps_its_number(machine: Machine) -> None:
    (asic,) = json.loads(recorded("amd/static-asic.json"))
    answers = {
        "static *": json.dumps([asic, {**asic, "gpu": 1}]),
        "metric *": "amd/rocm7-metric.json",
        "list -e *": listing({"hip_id": 1}, {"hip_id": 0}),
    }
    machine.install("amd-smi", answers)
    detector = Amd()
    whole = detector.look(machine.tools())
    one_less = json.dumps(
        {"gpu_data": json.loads(recorded("amd/rocm7-metric.json"))["gpu_data"][:1]}
    )
    machine.install("amd-smi", {**answers, "metric *": one_less})
    assert [bool(one.problems) for one in detector.look(machine.tools())] == [True, False]
    # At the next look, numbers are asked for too; it does not matter that they fail.
    del answers["list -e *"]
    machine.install("amd-smi", answers)
    assert detector.look(machine.tools()) == whole
    statics = [call for call in machine.calls if call.startswith("amd-smi static")]
    assert len(statics) == 2


def test_where_amd_smi_fails_rocm_smi_is_asked(machine: Machine) -> None:
    machine.install("amd-smi", {"static *": "Traceback (most recent call last):\n"})
    with pytest.raises((ToolFailed, ValueError)):
        Amd().look(machine.tools())
    machine.install("rocm-smi", {"--showproductname *": "amd/rocm-smi-7900xt.json"})
    (device,) = Amd().look(machine.tools())
    assert device.memory_total_bytes == 21458059264


def test_without_its_tools_there_is_no_device(machine: Machine) -> None:
    assert Amd().look(machine.tools()) == []
