"""docs/devices.md names what detectors look for, in both languages."""

import re
from pathlib import Path

import pytest

from gpustack.worker.detectors import amd, apple, ascend, cambricon, hygon, iluvatar, moore_threads
from gpustack.worker.detectors.tools import Tools

DOCS = Path(__file__).resolve().parents[3] / "docs"
DETECTORS = (
    amd.Amd(),
    ascend.Ascend(),
    hygon.Hygon(),
    moore_threads.MooreThreads(),
    iluvatar.Iluvatar(),
    cambricon.Cambricon(),
    apple.Apple(),
)


class Bare(Tools):
    """A machine that has no tool, and notes which were looked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def has(self, name: str) -> bool:
        self.asked.append(name)
        return False


@pytest.mark.parametrize("page", [DOCS / "devices.md", DOCS / "zh/devices.md"], ids=["en", "zh"])
def test_the_page_says_where_each_tool_is_looked_for(page: Path) -> None:
    rows = {}
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 4:
            rows[cells[0]] = set(re.findall(r"`([^`]+)`", cells[1]))
    for detector in DETECTORS:
        machine = Bare()
        assert detector.look(machine) == []
        (row,) = (words for name, words in rows.items() if detector.vendor in name)
        named = {name for name in machine.asked if "/" not in name}
        folders = {str(Path(name).parent) for name in machine.asked if "/" in name}
        # hccn_tool is looked for only where there are chips.
        beside = {"hccn_tool", "/usr/local/Ascend/driver/tools"} if "npu-smi" in named else set()
        assert row == named | folders | beside
