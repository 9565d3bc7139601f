from pathlib import Path
from typing import Any

import pytest
import yaml

from gpustack.config.load import load
from gpustack.config.resources import read
from gpustack.errors import SettingsError
from gpustack.worker.detectors.detection import Detection

GIB = 1 << 30
DOCS = Path(__file__).parents[2] / "docs"

CARD = {"vendor": "NVIDIA", "memory_total_bytes": 80 * GIB}


def example(page: str) -> dict[str, Any]:
    """The block that the page shows, as it stands there."""
    text = (DOCS / page).read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0]
    block: dict[str, Any] = yaml.safe_load(text)["resources"]
    return block


@pytest.mark.parametrize("page", ["devices.md", "zh/devices.md"])
async def test_the_example_of_the_documents_declares_what_it_says(
    page: str, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"resources": example(page)}))
    loaded = load({"config_file": str(file)}, {})
    assert loaded.warnings == ()
    status = await Detection(resources=read(loaded.settings.resources or {})).look()
    assert (status.cpu_count, status.memory_total_bytes) == (64, 512 * GIB)
    first, second = status.gpu_devices
    assert (first.index, first.vendor, first.type, first.name) == (0, "NVIDIA", "cuda", "H200")
    assert (first.memory_total_bytes, first.compute_capability) == (141 * GIB, "9.0")
    assert (second.index, second.type, second.memory_total_bytes) == (0, "cann", 65_452_113_920)
    assert second.network is not None
    assert second.network.ip == "10.20.0.11"


async def test_only_what_is_declared_is_not_found_out() -> None:
    found = await Detection([], resources=read({})).look()
    told = await Detection(
        [], resources=read({"cpu_count": 999, "memory_total_bytes": 4096})
    ).look()
    assert (told.cpu_count, told.memory_total_bytes, told.memory_used_bytes) == (999, 4096, 4096)
    assert told.gpu_devices == found.gpu_devices
    assert told.kernel == found.kernel


async def test_a_list_of_no_devices_means_that_there_are_none() -> None:
    class Card:
        vendor = "x"

        def look(self, tools: object) -> list[Any]:
            raise AssertionError("nobody is asked")

    status = await Detection([Card()], resources=read({"gpu_devices": []})).look()
    assert status.gpu_devices == []


def test_the_shape_of_gpustack_0_is_understood() -> None:
    # docs of v0.7.1 have no example; the keys are those of its `resources` in config/config.py.
    block = {
        "cpu": {"total": 8},
        "memory": {"total": 64 * GIB, "is_unified_memory": True},
        "gpu_devices": [
            {
                "name": "910B", "vendor": "Huawei", "device_index": 3, "device_chip_index": 0,
                "memory": {"total": 64 * GIB, "is_unified_memory": True}, "type": "cann",
                "network": {"status": "up", "inet": "10.0.0.1", "iface": "eth0"},
            }
        ],
    }  # fmt: skip
    found = read(block)
    assert (found.cpu_count, found.memory_total_bytes) == (8, 64 * GIB)
    assert found.devices == (
        {
            "name": "910B", "vendor": "Huawei", "type": "cann", "index": 3,
            "memory_total_bytes": 64 * GIB, "memory_unified": True,
            "network": {"status": "up", "ip": "10.0.0.1", "interface": "eth0"},
        },
    )  # fmt: skip


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ({"gpus": []}, "resources.gpus: there is no such key: want one of cpu, cpu_count,"),
        ({"gpu_devices": {}}, "resources.gpu_devices: want a list of devices"),
        ({"gpu_devices": [CARD, 4]}, "resources.gpu_devices[1]: want keys and values"),
        (
            {"gpu_devices": [CARD, {"vendor": "NVIDIA"}]},
            "resources.gpu_devices[1].memory_total_bytes: want bytes, such as 85899345920 or "
            "80GiB, got nothing",
        ),
        (
            {"gpu_devices": [CARD | {"memory_total_bytes": "80G"}]},
            "resources.gpu_devices[0].memory_total_bytes: want bytes",
        ),
        (
            {"gpu_devices": [{"vendor": "NVIDIA", "memory": {"total": -1}}]},
            "resources.gpu_devices[0].memory.total: want bytes",
        ),
        ({"gpu_devices": [CARD, CARD | {"index": 0}]}, "resources.gpu_devices[1].index: 0 of type"),
        ({"gpu_devices": [CARD | {"vendor": ""}]}, "resources.gpu_devices[0].vendor: want the"),
        ({"gpu_devices": [CARD | {"vendor": "Acme"}]}, "resources.gpu_devices[0].type: want the"),
        ({"gpu_devices": [CARD | {"compute_capability": 9.0}]}, "[0].compute_capability: want one"),
        ({"gpu_devices": [CARD | {"colour": "red"}]}, "resources.gpu_devices[0].colour: there is"),
        ({"gpu_devices": [CARD | {"network": {"mtu": "big"}}]}, "[0].network.mtu: want a whole"),
        ({"cpu_count": 0}, "resources.cpu_count: want a whole number from 1"),
        ({"memory_total_bytes": True}, "resources.memory_total_bytes: want bytes"),
    ],
)
def test_what_cannot_be_is_refused_at_start_with_its_place(
    block: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"debug": True, "resources": block}))
    with pytest.raises(SettingsError) as refused:
        load({"config_file": str(file)}, {})
    (line,) = str(refused.value).splitlines()
    assert problem in line
    assert "c.yaml, line 2, key resources" in line
