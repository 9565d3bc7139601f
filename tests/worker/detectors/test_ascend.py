import pytest

from gpustack.schemas.workers import Device, DeviceNetwork, ProblemCode
from gpustack.worker.detectors.ascend import Ascend, parse, parse_network, parse_uuid
from tests.worker.detectors.recordings import Machine, recorded

MIB = 1 << 20


def devices(table: str, mapping: str = "") -> list[Device]:
    return [chip.device for chip in parse(table, mapping).values()]


def test_a_card_with_one_chip_is_read() -> None:
    first, second = devices(recorded("ascend/910b4-24.1.1.txt"))
    assert first.model_dump(exclude_defaults=True) == {
        "index": 0,
        "name": "Ascend 910B4",
        "vendor": "Ascend",
        "type": "cann",
        "memory_total_bytes": 32768 * MIB,
        "memory_used_bytes": 26838 * MIB,
        "driver_version": "24.1.1",
        "architecture": "910B4",
        "utilization_percent": 0.0,
        "temperature_celsius": 30.0,
        "power_watts": 88.2,
    }
    assert (second.index, second.memory_used_bytes) == (1, 29356 * MIB)


def test_a_card_with_two_chips_is_two_devices() -> None:
    first, second = devices(recorded("ascend/310p-duo-25.2.0.txt"))
    assert (first.index, second.index) == (0, 1)
    assert (first.memory_total_bytes, second.memory_total_bytes) == (44280 * MIB, 43693 * MIB)
    assert first.power_watts is None  # "NA"
    assert first.problems == []


def test_a_chip_is_numbered_by_its_logical_id() -> None:
    table, mapping = recorded("ascend/310-21.0.4.txt"), recorded("ascend/310-21.0.4-mapping.txt")
    chips = parse(table, mapping)
    assert [chip.device.index for chip in chips.values()] == [0, 1, 2, 3]
    assert [chip.port for chip in chips.values()] == [3, 4, 5, 6]
    # Without the mapping the table's own ids are all there is.
    assert [device.index for device in devices(table)] == [3, 4, 5, 6]
    assert next(iter(chips)) == (6, 0)


def test_columns_that_other_products_have_are_read() -> None:
    a3 = parse(recorded("ascend/910-a3-25.3.rc1.txt"), recorded("ascend/910-a3-mapping.txt"))
    assert [(chip.device.index, chip.device.power_watts) for chip in a3.values()] == [
        (0, 163.6),
        (1, None),
    ]
    (chip,) = devices(recorded("ascend/950pr-25.7.rc1.6.txt"), recorded("ascend/950-mapping.txt"))
    assert (chip.architecture, chip.index, chip.power_watts) == ("950PR", 0, 195.6)
    assert (chip.memory_used_bytes, chip.memory_total_bytes) == (5239 * MIB, 131072 * MIB)


def test_memory_of_a_chip_with_hbm_is_not_that_of_its_processors() -> None:
    found = devices(recorded("ascend/910-24.1.RC2.txt"))
    assert [device.memory_total_bytes for device in found] == [32768 * MIB] * 4
    assert [device.memory_used_bytes for device in found] == [0] * 4


@pytest.mark.parametrize("health", ["Alarm", "Critical", "UNKNOWN"])
def test_a_chip_that_npu_smi_calls_ill_has_a_problem(health: str) -> None:
    table = recorded("ascend/910b4-24.1.1.txt").replace("OK   ", f"{health:<5}", 1)
    ill, well = devices(table)
    assert [one.code for one in ill.problems] == [ProblemCode.REPORTED]
    assert health in ill.problems[0].message
    assert well.problems == []


@pytest.mark.parametrize("health", ["NA", "-"])
def test_a_chip_whose_health_npu_smi_does_not_say_is_used(health: str) -> None:
    table = recorded("ascend/910b4-24.1.1.txt").replace("OK", f"{health:<2}")
    assert [device.problems for device in devices(table)] == [[], []]


def test_a_warning_is_no_reason_to_leave_a_chip_unused() -> None:
    assert "Warning" in recorded("ascend/910-24.1.RC2.txt")
    assert all(not device.problems for device in devices(recorded("ascend/910-24.1.RC2.txt")))


def test_a_chip_without_a_logical_id_has_a_problem_and_a_number_of_its_own() -> None:
    mapping = recorded("ascend/310-21.0.4-mapping.txt").replace(
        "2                              MiniD", "-                              MiniD"
    )
    found = devices(recorded("ascend/310-21.0.4.txt"), mapping)
    assert [device.index for device in found] == [0, 1, 4, 3]
    assert [bool(device.problems) for device in found] == [False, False, True, False]


def test_uuid_and_network_are_read() -> None:
    uuid = "42C711D4 20B03704 4A10C8D4 14CC040A D2102003"
    assert parse_uuid(recorded("ascend/board.txt")) == uuid
    answers = [recorded(f"ascend/hccn-{what}.txt") for what in ("link", "ip", "mac", "gateway")]
    assert parse_network("\n".join(answers)) == DeviceNetwork(
        status="up",
        ip="192.168.6.10",
        netmask="255.255.255.0",
        mac="xx:xx:xx:xx:xx:xx",
        gateway="192.168.6.1",
        interface="eth0",
    )


def test_npu_smi_and_hccn_tool_are_run(machine: Machine) -> None:
    machine.install(
        "npu-smi",
        {
            "info": "ascend/910-a3-25.3.rc1.txt",
            "info -m": "ascend/910-a3-mapping.txt",
            "info -t board -i 0 -c 0": "ascend/board.txt",
        },
    )
    ports = {"-link": "link", "-ip": "ip", "-mac": "mac", "-gateway": "gateway", "-mtu": "mtu"}
    machine.install(
        "hccn_tool", {f"-i 0 {what} -g": f"ascend/hccn-{name}.txt" for what, name in ports.items()}
    )
    detector = Ascend()
    first, second = detector.look(machine.tools())
    assert (first.index, second.index) == (0, 1)
    assert first.uuid.startswith("42C711D4")
    assert first.network is not None
    assert (first.network.status, first.network.mtu) == ("up", 8192)
    # A chip that has no port, or whose commands fail, is a device all the same.
    assert (second.uuid, second.network) == ("", None)
    assert detector.look(machine.tools()) == [first, second]
    assert machine.calls.count("npu-smi info -t board -i 0 -c 0") == 1


def test_a_chip_keeps_its_number_when_the_mapping_fails_once(machine: Machine) -> None:
    table = {"info": "ascend/310-21.0.4.txt"}
    machine.install("npu-smi", {**table, "info -m": "ascend/310-21.0.4-mapping.txt"})
    detector = Ascend()
    assert [device.index for device in detector.look(machine.tools())] == [0, 1, 2, 3]
    machine.install("npu-smi", table)
    assert [device.index for device in detector.look(machine.tools())] == [0, 1, 2, 3]


def test_chips_take_turns_so_that_a_look_stays_short(machine: Machine) -> None:
    table = recorded("ascend/910b4-24.1.1.txt").splitlines()
    block = "\n".join(table[6:8]) + "\n"
    cards = [block.replace("| 0     910B4", f"| {card}     910B4") for card in range(8)]
    machine.install("npu-smi", {"info": "\n".join(table[:6]) + "\n" + "".join(cards)})
    machine.install("hccn_tool", {"* -link -g": "ascend/hccn-link.txt"})
    detector = Ascend()
    first = detector.look(machine.tools())
    assert [device.network is not None for device in first] == [True] * 4 + [False] * 4
    second = detector.look(machine.tools())
    assert all(device.network is not None for device in second)


@pytest.mark.parametrize(
    "printed",
    [
        "",
        "dcmi model initialized failed, because the device is used. ret is -8020",
        "驱动未加载",
        "NPU Health\n| 0 x | OK | 1 |",
    ],
)
def test_what_is_no_table_is_no_device_list(printed: str) -> None:
    with pytest.raises(ValueError, match="npu-smi"):
        parse(printed, "")


def test_without_its_tool_there_is_no_device(machine: Machine) -> None:
    assert Ascend().look(machine.tools()) == []
