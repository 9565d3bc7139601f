"""What is known of devices, whatever their detector says look after look."""

from hypothesis import given
from hypothesis import strategies as st

from gpustack.schemas.workers import Device, ProblemCode
from gpustack.worker.detectors.known import Known, after_answer


def device(index: int, uuid: str) -> Device:
    return Device(index=index, vendor="v", type="t", uuid=uuid, memory_total_bytes=1)


answers = st.lists(
    st.lists(st.builds(device, st.integers(0, 4), st.sampled_from(["a", "b", "c", "d", ""]))),
    max_size=6,
)


@given(answers)
def test_no_two_devices_have_one_index_and_what_answers_is_well(looks: list[list[Device]]) -> None:
    known = Known()
    for found in looks:
        known = after_answer(known, found)
        indexes = [one.index for one in known.devices]
        assert indexes == sorted(set(indexes))
        answering = {one.index for one in found}
        well = {one.index for one in known.devices if not one.problems}
        assert well == answering
        assert {each.code for one in known.devices for each in one.problems} <= {
            ProblemCode.LOST,
            ProblemCode.TOOL,
        }
