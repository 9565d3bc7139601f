import pytest

from gpustack.schemas.workers import ProblemCode
from gpustack.worker.detectors.iluvatar import Iluvatar, parse, parse_table
from gpustack.worker.detectors.tools import ToolFailed
from tests.worker.detectors.recordings import Machine, recorded

MIB = 1 << 20


def test_the_xml_of_ixsmi_is_read() -> None:
    first, second = parse(recorded("iluvatar/mr-v100-4.2.0.xml"))
    assert first.model_dump(exclude_defaults=True) == {
        "index": 0,
        "name": "Iluvatar MR-V100",
        "vendor": "Iluvatar",
        "type": "corex",
        "uuid": "GPU-1ac807aa-cbcd-5579-8591-d59d436d6eca",
        "memory_total_bytes": 32768 * MIB,
        "memory_used_bytes": 27780 * MIB,
        "driver_version": "4.2.0",
        "runtime_version": "10.2",
        "utilization_percent": 0.0,
        "temperature_celsius": 44.0,
        "power_watts": 37.0,
    }
    assert (second.index, second.memory_used_bytes) == (1, 27716 * MIB)


def test_in_a_container_a_card_is_counted_from_zero() -> None:
    xml = recorded("iluvatar/mr-v100-4.2.0.xml").replace("<minor_number>0<", "<minor_number>3<")
    assert [device.index for device in parse(xml)] == [0, 1]


def test_errors_and_heat_that_ixsmi_reports_are_problems() -> None:
    xml = recorded("iluvatar/mr-v100-4.2.0.xml")
    xml = xml.replace("<double_bit>0<", "<double_bit>2<", 1).replace(">44 C<", ">100 C<", 1)
    ill, well = parse(xml)
    assert [one.code for one in ill.problems] == [ProblemCode.ECC, ProblemCode.THERMAL]
    assert well.problems == []


def test_the_table_of_ixsmi_is_read() -> None:
    first, second, _ = parse_table(recorded("iluvatar/bi-v150-4.3.0.txt"))
    assert (first.name, first.power_watts, second.power_watts) == ("Iluvatar BI-V150", None, 103.0)
    assert (first.memory_used_bytes, first.memory_total_bytes) == (64 * MIB, 32768 * MIB)
    assert (first.driver_version, first.runtime_version) == ("4.3.0", "10.2")
    duo = parse_table(recorded("iluvatar/mr-v100-duo-4.4.0.txt"))
    assert [(one.name, one.temperature_celsius) for one in duo] == [
        ("Iluvatar MR-V100 DUO", 37.0),
        ("Iluvatar MR-V100 DUO", 36.0),
    ]


def test_ixsmi_is_run_and_its_table_where_it_has_no_xml(machine: Machine) -> None:
    assert Iluvatar().look(machine.tools()) == []
    answers = {"": "iluvatar/bi-v150-4.3.0.txt"}
    machine.install("ixsmi", answers)
    assert len(Iluvatar().look(machine.tools())) == 3
    machine.install("ixsmi", {**answers, "-q -x": "iluvatar/mr-v100-4.2.0.xml"})
    assert Iluvatar().look(machine.tools())[1].uuid.startswith("GPU-be5622c9")
    machine.install("ixsmi", {})
    with pytest.raises(ToolFailed, match="ixsmi"):
        Iluvatar().look(machine.tools())
