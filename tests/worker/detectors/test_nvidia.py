import pytest

from gpustack.schemas.workers import Device, DeviceProblem, DeviceProcess, ProblemCode
from gpustack.worker.detectors.nvidia import devices
from gpustack.worker.detectors.nvidia_health import (
    HW_THERMAL_SLOWDOWN,
    PROGRAMS_FAULT,
    XIDS,
    Health,
    xid_said,
)
from gpustack.worker.detectors.nvml import Answer, Reading, Refusal

MIB = 1 << 20
NO = {"refused": 3, "text": "Not Supported"}
HOST = (130_663_165_952, 9_251_195_904)

# A workstation's card, of which NVML tells less than of a data center's. Values of nvidia-smi in
# https://github.com/Ricks-Lab/gpu-utils/issues/88; capability by NVIDIA's list of CUDA GPUs.
RTX_2080 = {
    "index": 1, "uuid": "GPU-22b2c6ac-2d49-4863-197c-9c469071178a", "name": "GeForce RTX 2080",
    "memory": {"total": 7979 * MIB, "used": 1242 * MIB}, "utilization_percent": 98,
    "temperature_celsius": 40, "power_milliwatts": 163_500, "architecture": 6,
    "capability": [7, 5], "slowdowns": 0, "ecc_uncorrected": NO, "remapped": NO,
    "processes": [{"pid": 4242, "memory": 1220 * MIB}, {"pid": 4243, "memory": None}],
    "mig": None,
}  # fmt: skip

# Memory is the host's: https://github.com/XuehaiPan/nvitop/pull/208 (NVML asked by ctypes, driver
# 580.173.02) and https://github.com/leptonai/gpud/pull/1170 (UUID).
GB10 = {
    "index": 0, "uuid": "GPU-2dee1e25-b3b5-007e-2b55-79f2d0f2ebe5", "name": "NVIDIA GB10",
    "memory": NO, "utilization_percent": 0, "temperature_celsius": 35, "power_milliwatts": 11_170,
    "architecture": 10, "capability": [12, 1], "slowdowns": 0, "ecc_uncorrected": NO,
    "remapped": NO, "processes": [], "mig": None,
}  # fmt: skip


def mig(position: int, gpu_instance: int, used_mib: int) -> dict[str, object]:
    """Of a card split in three: https://github.com/XuehaiPan/nvitop/pull/8 (nvidia-smi's table)."""
    return {
        "position": position, "uuid": f"MIG-0000000{position}-dcef-5ab6-8f5c-000000000000",
        "name": "NVIDIA A100-SXM4-80GB MIG 2g.20gb",
        "memory": {"total": 19968 * MIB, "used": used_mib * MIB},
        "gpu_instance": gpu_instance, "compute_instance": 0, "processes": [],
    }  # fmt: skip


A100 = {
    "index": 1, "uuid": "GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77",
    "name": "NVIDIA A100-SXM4-80GB", "memory": {"total": 81920 * MIB, "used": 24205 * MIB},
    "utilization_percent": NO, "temperature_celsius": 31, "power_milliwatts": 62_000,
    "architecture": 7, "capability": [8, 0], "slowdowns": 0, "ecc_uncorrected": 0,
    "remapped": [0, 0, 0, 0], "processes": [],
    "mig": [mig(0, 3, 14366), mig(1, 5, 9826), mig(2, 6, 13)],
}  # fmt: skip


def reading(*cards: object, xids: object = ()) -> Reading:
    """As the process that asks NVML prints it."""
    said = {"driver": "580.126.09", "cuda": 13000, "cards": cards, "xids": xids}
    answer = Answer.validate_python(said)
    assert isinstance(answer, Reading)
    return answer


def found(*cards: object, health: Health | None = None) -> list[Device]:
    return list(devices(reading(*cards), health or Health(), HOST))


def after(*xids: dict[str, object], card: dict[str, object]) -> list[list[str]]:
    """Messages of each device's problems once these errors were reported."""
    health = Health()
    health.hear(reading(card, xids=xids).xids)
    return [[one.message for one in each.problems] for each in found(card, health=health)]


def test_a_card_is_told_with_all_that_nvml_says_of_it() -> None:
    assert found(RTX_2080) == [
        Device(
            index=1,
            name="GeForce RTX 2080",
            vendor="NVIDIA",
            type="cuda",
            uuid="GPU-22b2c6ac-2d49-4863-197c-9c469071178a",
            memory_total_bytes=7979 * MIB,
            memory_used_bytes=1242 * MIB,
            driver_version="580.126.09",
            runtime_version="13.0",
            architecture="Turing",
            compute_capability="7.5",
            utilization_percent=98,
            temperature_celsius=40,
            power_watts=163.5,
            processes=[
                DeviceProcess(pid=4242, memory_bytes=1220 * MIB),
                DeviceProcess(pid=4243, memory_bytes=None),
            ],
        )
    ]


def test_a_card_that_shares_the_hosts_memory_has_that() -> None:
    (device,) = found(GB10)
    assert device.memory_unified
    assert (device.memory_total_bytes, device.memory_used_bytes) == HOST
    assert device.problems == []


def test_a_split_card_is_its_instances_with_indexes_and_uuids_of_their_own() -> None:
    there = found(A100, RTX_2080 | {"index": 2})
    assert [one.index for one in there] == [200, 201, 202, 2]
    assert [one.uuid[:12] for one in there[:3]] == ["MIG-00000000", "MIG-00000001", "MIG-00000002"]
    assert {one.parent_uuid for one in there[:3]} == {A100["uuid"]}
    assert there[0].memory_used_bytes == 14366 * MIB
    assert (there[0].compute_capability, there[0].architecture) == ("8.0", "Ampere")


def test_a_card_in_mig_mode_without_an_instance_is_listed_and_not_well() -> None:
    (device,) = found(A100 | {"mig": []})
    assert [one.code for one in device.problems] == [ProblemCode.REPORTED]


@pytest.mark.parametrize("silent", [{"index": 1, "silent": {"refused": 15, "text": "GPU is lost"}}])
def test_a_card_that_gives_no_handle_is_lost(silent: dict[str, object]) -> None:
    # https://github.com/rossumai/nvgpu/issues/6
    (device,) = found(silent)
    assert device.index == 1
    assert device.problems == [DeviceProblem(code=ProblemCode.LOST, message="NVML: GPU is lost")]


def test_a_card_that_gets_lost_while_it_is_asked_is_lost() -> None:
    lost = {"refused": 15, "text": "GPU is lost"}
    asked = {key: lost for key in RTX_2080 if key not in ("index", "mig")}
    (device,) = found(RTX_2080 | asked)
    assert [one.code for one in device.problems] == [ProblemCode.LOST]


def test_a_card_of_another_container_is_none_of_ours() -> None:
    assert found({"index": 0, "silent": {"refused": 4, "text": "Insufficient Permissions"}}) == []


def test_what_nobody_understands_is_refused() -> None:
    for garbage in ("{}", "[1]", '{"driver": "1", "cuda": 1, "cards": [{}]}', ""):
        with pytest.raises(ValueError, match="validation error"):
            Answer.validate_json(garbage)
    assert Answer.validate_python(NO) == Refusal(refused=3, text="Not Supported")


def test_an_error_of_the_card_makes_it_unwell_and_one_of_a_program_does_not() -> None:
    uuid = RTX_2080["uuid"]
    for code in sorted(XIDS):
        ((message,),) = after({"card": uuid, "code": code}, card=RTX_2080)
        assert message.startswith(f"Xid {code}: ")
    for code in (*sorted(PROGRAMS_FAULT), 63, 9999):
        assert after({"card": uuid, "code": code}, card=RTX_2080) == [[]]
    assert not PROGRAMS_FAULT & set(XIDS)
    assert {13, 31, 43, 45} <= PROGRAMS_FAULT


def test_an_error_that_comes_again_is_told_once_and_of_its_card_alone() -> None:
    health = Health()
    xid = {"card": RTX_2080["uuid"], "code": 79}
    for _ in range(3):
        assert health.hear(reading(xids=[xid]).xids) == []
    there = found(RTX_2080, GB10, health=health)
    assert [len(one.problems) for one in there] == [1, 0]


def test_an_error_of_a_card_that_nobody_names_is_said() -> None:
    health = Health()
    (said,) = health.hear(reading(xids=[{"card": "", "code": 79}]).xids)
    assert xid_said(said) == "a card: Xid 79, the card has fallen off the bus"
    nameless = RTX_2080 | {"uuid": NO}
    assert found(nameless, health=health)[0].problems == []


def test_an_error_of_one_instance_leaves_the_others_well() -> None:
    card = {"card": A100["uuid"], "code": 48}
    one = after(card | {"gpu_instance": 5, "compute_instance": 0}, card=A100)
    assert [len(messages) for messages in one] == [0, 1, 0]
    assert [len(messages) for messages in after(card, card=A100)] == [1, 1, 1]


def test_memory_errors_that_were_not_corrected_make_a_card_unwell_until_they_are_gone() -> None:
    (device,) = found(RTX_2080 | {"ecc_uncorrected": 2})
    assert [one.code for one in device.problems] == [ProblemCode.ECC]
    assert device.problems[0].message.startswith("2 memory errors")
    (device,) = found(RTX_2080 | {"remapped": [0, 1, 0, 1]})
    assert [one.code for one in device.problems] == [ProblemCode.ECC]
    (device,) = found(RTX_2080 | {"ecc_uncorrected": 0, "remapped": [3, 0, 1, 0]})
    assert device.problems == []


def test_a_card_that_the_hardware_slows_down_says_so_with_a_reason() -> None:
    (device,) = found(RTX_2080 | {"slowdowns": HW_THERMAL_SLOWDOWN | 1})
    assert [one.code for one in device.problems] == [ProblemCode.THERMAL]
    # A power cap, or an idle card, is no heat.
    assert found(RTX_2080 | {"slowdowns": 0x4 | 0x1 | 0x8 | 0x20})[0].problems == []
