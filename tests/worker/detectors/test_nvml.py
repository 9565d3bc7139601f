"""The process that asks NVML, with a library that looks like it."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpustack.lib import platform
from gpustack.worker.detectors.nvml import is_installed
from tests.worker.detectors.recordings import recorded

MIB = 1 << 20

SOURCE = Path(__file__).parents[2] / "support/fake_nvml/nvml.c"

#: LD_LIBRARY_PATH counts for processes that start with it: an agent's looks, and what it sees.
LOOKS = """
import asyncio, json, sys
from pathlib import Path
import psutil
from gpustack.worker.detectors.detection import Detection
from gpustack.worker.detectors.nvidia import Nvidia

async def main():
    detection = Detection([Nvidia()], limit_s=float(sys.argv[2]), patience_s=60)
    for mode in sys.argv[3:]:
        Path(sys.argv[1]).write_text(mode)
        status = await detection.look()
        print(json.dumps([one.model_dump(mode="json") for one in status.gpu_devices]), flush=True)
    print(json.dumps("pynvml" in sys.modules))
    print(json.dumps([one.pid for one in psutil.Process().children()]))
    if "keep" not in sys.argv: detection.close()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (compiler := shutil.which("cc")) is None or sys.platform != "linux":
        pytest.skip("needs a C compiler, and Linux")
    folder = tmp_path_factory.mktemp("nvml")
    target = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", target, SOURCE], check=True)
    return folder


def look(library: Path, *modes: str, limit_s: float = 30) -> tuple[list[Any], str]:
    """What looks see while the library does as `modes` say, and what was logged."""
    state = library / "mode"
    environment = os.environ | {"LD_LIBRARY_PATH": str(library), "FAKE_NVML": str(state)}
    argv = [sys.executable, "-c", LOOKS, str(state), str(limit_s), *modes]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_all_that_the_library_says_arrives_and_errors_are_heard(library: Path) -> None:
    (first, second, imports, children), _ = look(library, "ok", "ok")
    assert first == [
        {
            "index": 0, "name": "Fake card", "vendor": "NVIDIA", "type": "cuda", "uuid": "GPU-fake",
            "memory_total_bytes": 80 << 30, "memory_used_bytes": 3 << 30, "memory_unified": False,
            "parent_uuid": "", "driver_version": "1.2.3", "runtime_version": "12.4",
            "architecture": "Hopper", "compute_capability": "9.0", "network": None, "problems": [],
            "utilization_percent": 42, "temperature_celsius": 55, "power_watts": 123.456,
            "processes": [],
        }
    ]  # fmt: skip
    (problem,) = second[0]["problems"]
    assert problem["code"] == "xid"
    assert problem["message"].startswith("Xid 79: the card has fallen off the bus")
    assert imports is False
    (asking,) = children
    assert platform.start_ticks(asking) is None


def test_what_is_told_of_an_h200_is_what_nvidia_smi_says_of_it(library: Path) -> None:
    """Of the very machine: nvidia-smi --query-gpu=… --format=csv, and its table of processes."""
    head, row = csv.reader(recorded("nvidia/h200-smi.csv").splitlines(), skipinitialspace=True)
    smi = {name.partition(" [")[0]: value.split()[0] for name, value in zip(head, row, strict=True)}
    smi["name"] = row[1]
    ((idle,), (busy,), *_), _ = look(library, "recorded", "busy")
    assert {
        "index": str(idle["index"]),
        "name": idle["name"],
        "uuid": idle["uuid"],
        "memory.total": str(idle["memory_total_bytes"] // MIB),
        # 615 MiB, which the driver keeps for itself, are in what NVML's older call says.
        "memory.used": str(idle["memory_used_bytes"] // MIB),
        "utilization.gpu": f"{idle['utilization_percent']:g}",
        "temperature.gpu": f"{idle['temperature_celsius']:g}",
        "power.draw": f"{idle['power_watts']:g}",
        "driver_version": idle["driver_version"],
        "compute_cap": idle["compute_capability"],
    } == smi
    assert (idle["architecture"], idle["runtime_version"]) == ("Hopper", "13.0")
    assert (idle["problems"], idle["processes"], busy["problems"]) == ([], [], [])
    # "1039MiB / 143771MiB", and 1030MiB of them process 446.
    assert round(busy["memory_used_bytes"] / MIB) == 1039
    (process,) = busy["processes"]
    assert (process["pid"], process["memory_bytes"] // MIB) == (446, 1030)


def test_a_library_that_crashes_costs_the_cards_health_until_it_works_again(library: Path) -> None:
    (*looks, _, _), said = look(library, "ok", "crash", "crash", "ok")
    assert [[one["code"] for one in each[0]["problems"]] for each in looks] == [
        [],
        ["tool"],
        ["tool"],
        [],
    ]
    assert "was ended by signal 11" in looks[1][0]["problems"][0]["message"]
    assert said.count("cannot read the devices of NVIDIA") == 1


@pytest.mark.slow
def test_a_library_that_hangs_is_ended_and_asked_again(library: Path) -> None:
    (*looks, _, children), _ = look(library, "ok", "hang", "ok", "ok", limit_s=10)
    assert [len(each[0]["problems"]) for each in looks] == [0, 1, 0, 1]
    assert "has not answered within 8 s" in looks[1][0]["problems"][0]["message"]
    assert len(children) == 1  # the one that hung is gone; Xid 79 was heard by its successor


@pytest.mark.slow
def test_a_card_that_the_library_lost_stays_listed_as_lost(library: Path) -> None:
    (first, second, *_), _ = look(library, "ok", "lost")
    assert first[0]["problems"] == []
    assert second[0]["problems"] == [{"code": "lost", "message": "NVML: GPU is lost"}]
    assert second[0]["memory_total_bytes"] == 80 << 30


@pytest.mark.slow
def test_a_driver_of_another_version_is_said(library: Path) -> None:
    (first, *_), said = look(library, "mismatch", "mismatch")
    assert first == []
    assert said.count("NVML: RM has detected an NVML/RM version mismatch") == 1


@pytest.mark.slow
def test_who_asks_ends_with_who_reads(library: Path) -> None:
    (*_, children), _ = look(library, "ok", "keep")
    assert platform.start_ticks(children[0]) is None


@pytest.mark.slow
def test_a_library_that_is_no_library_is_said(tmp_path: Path) -> None:
    # What containers show when the driver's files were not put into them.
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"")
    (first, *_), said = look(tmp_path, "ok", "ok")
    assert first == []
    assert said.count("libnvidia-ml.so.1 is not found or cannot be loaded") == 1


def test_a_machine_without_a_driver_starts_no_process_for_it(tmp_path: Path) -> None:
    if is_installed({}):
        pytest.skip("this machine has an NVIDIA driver")
    (first, _, children), said = look(tmp_path, "ok")
    assert (first, children, said) == ([], [], "")
