from collections.abc import Callable
from pathlib import Path

import pytest

from gpustack.schemas.workers import Device
from gpustack.worker.detectors import Detector
from gpustack.worker.detectors.amd import Amd
from gpustack.worker.detectors.ascend import Ascend
from gpustack.worker.detectors.cambricon import Cambricon
from gpustack.worker.detectors.hygon import Hygon
from gpustack.worker.detectors.moore_threads import MooreThreads
from gpustack.worker.detectors.runtimes import completed
from tests.worker.detectors.recordings import Machine

#: What stands in these files, as gpustack/worker/detectors/runtimes.py says where it is from.
INSTALLATIONS = {
    "rocm": ("opt/rocm/.info/version", "6.3.2-66\n", "6.3.2"),
    "cann": (
        "usr/local/Ascend/ascend-toolkit/latest/aarch64-linux/ascend_toolkit_install.info",
        "package_name=Ascend-cann-toolkit\nversion=8.0.0\ninnerversion=V100R001C20SPC001B251\n"
        "compatible_version=[V100R001C15],[V100R001C17]\narch=aarch64\nos=linux\n",
        "8.0.0",
    ),
    "dcu": ("opt/dtk/.info/rocm_version", "25.04.4\n", "25.04.4"),
    "musa": (
        "usr/local/musa/version.json",
        '{\n "musa_toolkits": {\n  "version": "5.1.0",\n  "branch": "release_musa_5.1.0"\n }\n}\n',
        "5.1.0",
    ),
    "mlu": ("usr/local/neuware/version.txt", "Neuware Version 3.9.0\n", "3.9.0"),
}


def device(kind: str, *, version: str = "") -> Device:
    return Device(index=0, vendor="x", type=kind, memory_total_bytes=1, runtime_version=version)


def install(root: Path, kind: str, text: str) -> Path:
    path = root / INSTALLATIONS[kind][0]
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("kind", INSTALLATIONS)
def test_the_version_of_the_installation_is_told(tmp_path: Path, kind: str) -> None:
    _, text, version = INSTALLATIONS[kind]
    assert completed([device(kind)], tmp_path)[0].runtime_version == ""
    path = install(tmp_path, kind, text)
    assert completed([device(kind)], tmp_path)[0].runtime_version == version
    assert completed([device(kind, version="12.4")], tmp_path)[0].runtime_version == "12.4"
    path.write_bytes(b"\xff\xfe none of this is a version \x00")
    assert completed([device(kind)], tmp_path)[0].runtime_version == ""
    path.unlink()
    path.mkdir()
    assert completed([device(kind)], tmp_path)[0].runtime_version == ""


@pytest.mark.parametrize(
    ("kind", "detector", "name", "answers"),
    [
        ("rocm", Amd, "rocm-smi", {"--showproductname *": "amd/rocm-smi-7900xt.json"}),
        ("cann", Ascend, "npu-smi", {"info": "ascend/910b4-24.1.1.txt"}),
        ("dcu", Hygon, "hy-smi", {"*": "hygon/k100-ai.json"}),
        ("musa", MooreThreads, "mthreads-gmi", {"-q --json": "moore_threads/s5000.json"}),
        ("mlu", Cambricon, "cnmon", {"": "cambricon/mlu370-x8-5.10.13.txt"}),
    ],
)
def test_a_detector_adds_it_to_what_its_tool_says(
    tmp_path: Path,
    machine: Machine,
    kind: str,
    detector: Callable[[Path], Detector],
    name: str,
    answers: dict[str, str],
) -> None:
    _, text, version = INSTALLATIONS[kind]
    machine.install(name, answers)
    install(tmp_path / "root", kind, text)
    found = detector(tmp_path / "root").look(machine.tools())
    assert {one.runtime_version for one in found} == {version}
