"""All detectors together, on a machine with devices of every vendor that has a tool to run."""

import logging
import sys

import pytest

from gpustack.schemas.workers import ProblemCode, WorkerStatus
from gpustack.worker.detectors import DETECTORS
from gpustack.worker.detectors.detection import Detection
from tests.worker.detectors.recordings import Machine

#: Type of device -> its tool, what it answers, and how many devices that shows.
TOOLS = {
    "rocm": ("rocm-smi", {"--showproductname *": "amd/rocm-smi-7900xt.json"}, 1),
    "cann": ("npu-smi", {"info": "ascend/910b4-24.1.1.txt"}, 2),
    "dcu": ("hy-smi", {"--showid *": "hygon/k100-ai.json"}, 2),
    "musa": ("mthreads-gmi", {"-q --json": "moore_threads/s5000.json"}, 2),
    "corex": ("ixsmi", {"": "iluvatar/bi-v150-4.3.0.txt"}, 3),
    "mlu": ("cnmon", {"": "cambricon/mlu370-x8-5.10.13.txt"}, 2),
    "mps": ("system_profiler", {"SPHardwareDataType *": "apple/m2-pro.json"}, 1),
}


@pytest.fixture
def everything(machine: Machine) -> Machine:
    if sys.platform == "darwin":
        pytest.skip("has a system_profiler of its own")
    for name, answers, _ in TOOLS.values():
        machine.install(name, answers)
    return machine


def counted(status: WorkerStatus) -> dict[str, int]:
    kinds = [one.type for one in status.gpu_devices if one.type in TOOLS]
    return {kind: kinds.count(kind) for kind in TOOLS}


def unwell(status: WorkerStatus) -> set[str]:
    return {
        one.type
        for one in status.gpu_devices
        if any(each.code is ProblemCode.TOOL for each in one.problems)
    }


async def test_devices_of_all_vendors_on_one_host_and_each_tools_failure_costs_its_own_alone(
    everything: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    detection = Detection([type(one)() for one in DETECTORS], patience_s=60)
    there = {kind: number for kind, (_, _, number) in TOOLS.items()}
    first = await detection.look()
    assert (counted(first), unwell(first)) == (there, set())
    for kind, (name, answers, _) in TOOLS.items():
        caplog.clear()
        everything.install(name, {"*": "what is this\nand this\n"})
        status = await detection.look()
        assert (counted(status), unwell(status)) == (there, {kind})
        said = [one.message for one in caplog.records if one.levelno >= logging.WARNING]
        assert len(said) == 1
        everything.install(name, answers)
    assert (await detection.look()).facts() == first.facts()
