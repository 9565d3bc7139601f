import logging
import sys
import threading
from pathlib import Path

import pytest

from gpustack.lib import platform
from gpustack.schemas.workers import Device, DeviceProblem, DeviceProcess, ProblemCode, WorkerStatus
from gpustack.worker.detectors.detection import Detection
from gpustack.worker.detectors.tools import ToolFailed, Tools
from tests.support.wait import eventually, soon


class Tool:
    """A vendor's detector for tests: its command prints lines of "index name bytes"."""

    def __init__(self, *command: str, vendor: str = "test") -> None:
        self.command = command
        self.vendor = vendor

    def look(self, tools: Tools) -> list[Device]:
        if not tools.has(self.command[0]):
            return []
        rows = (line.split() for line in tools.run(*self.command).splitlines())
        return [
            Device(
                index=int(index), name=name, vendor=self.vendor, type=self.vendor, uuid=name,
                memory_total_bytes=int(size),
            )
            for index, name, size in rows
        ]  # fmt: skip


class Script(Tool):
    """A detector whose tool is a shell script that tests write anew."""

    def __init__(self, folder: Path, text: str) -> None:
        super().__init__(str(folder / "tool"))
        self.write(text)

    @property
    def path(self) -> Path:
        return Path(self.command[0])

    def write(self, text: str) -> None:
        # Put in place whole: a file that is being written cannot be run.
        new = self.path.with_suffix(".new")
        new.write_text(f"#!/bin/sh\n{text}\n")
        new.chmod(0o755)
        new.replace(self.path)


class Blocked:
    """A detector whose library call blocks without holding the interpreter, until it is let go."""

    vendor = "blocked"

    def __init__(self) -> None:
        self.free = threading.Event()
        self.looks = 0

    def look(self, tools: Tools) -> list[Device]:
        self.looks += 1
        self.free.wait()
        return [Device(index=0, name="late", vendor="blocked", memory_total_bytes=1)]


TWO = "echo 0 left 1024; echo 1 right 2048"


def problems(status: WorkerStatus) -> dict[str, list[ProblemCode]]:
    return {one.name: [each.code for each in one.problems] for one in status.gpu_devices}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


async def test_devices_come_from_the_tools_that_are_there(tmp_path: Path) -> None:
    good = Tool("sh", "-c", TWO)
    other = Tool("sh", "-c", "echo 0 third 512", vendor="other")
    absent = Tool(str(tmp_path / "no-such-tool"))
    broken, odd = Tool("sh", "-c", "exit 3"), Tool("sh", "-c", "echo what is this")
    status = await Detection([absent, broken, odd, good, other]).look()
    assert problems(status) == {"left": [], "right": [], "third": []}
    assert [device.memory_total_bytes for device in status.gpu_devices] == [1024, 2048, 512]


async def test_a_tool_that_never_worked_costs_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    # What it says differs in a number each time.
    detection = Detection([Tool("sh", "-c", "echo driver $$ is not loaded >&2; exit 9")])
    for _ in range(3):
        assert (await detection.look()).gpu_devices == []
    (said,) = warnings(caplog)
    assert said.startswith("cannot read the devices of test: sh -c")
    assert "exited with 9: driver" in said


@pytest.mark.parametrize("broken", ["exit 1", "echo rubbish", "printf '\\377\\376'"])
async def test_devices_stay_listed_unwell_when_their_tool_fails_and_are_well_again_after(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    tool = Script(tmp_path, TWO)
    detection = Detection([tool])
    facts = (await detection.look()).facts()
    tool.write(broken)
    unwell = [await detection.look(), await detection.look()]
    assert problems(unwell[0]) == {"left": [ProblemCode.TOOL], "right": [ProblemCode.TOOL]}
    assert unwell[0].facts() == unwell[1].facts()
    assert len(warnings(caplog)) == 1
    tool.write(TWO)
    assert (await detection.look()).facts() == facts


async def test_devices_stay_listed_unwell_when_their_tool_hangs(tmp_path: Path) -> None:
    tool = Script(tmp_path, TWO)
    detection = Detection([tool], limit_s=2.0, patience_s=60)
    await detection.look()
    tool.write("exec sleep 60")
    status = await detection.look()
    assert problems(status) == {"left": [ProblemCode.TOOL], "right": [ProblemCode.TOOL]}
    assert "tool did not end within 1.6 s" in status.gpu_devices[0].problems[0].message


async def test_devices_stay_listed_unwell_when_their_tool_is_gone(tmp_path: Path) -> None:
    tool = Script(tmp_path, TWO)
    detection = Detection([tool])
    await detection.look()
    tool.path.unlink()
    assert problems(await detection.look()) == {
        "left": [ProblemCode.TOOL],
        "right": [ProblemCode.TOOL],
    }


async def test_one_device_of_several_that_is_gone_is_lost_until_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tool = Script(tmp_path, TWO)
    detection = Detection([tool])
    await detection.look()
    tool.write("echo 0 left 1024")
    status = await detection.look()
    assert problems(status) == {"left": [], "right": [ProblemCode.LOST]}
    await detection.look()
    (said,) = warnings(caplog)
    assert said.startswith("device 1 (right) of test is unhealthy: it was there and")
    assert "was there" in status.gpu_devices[1].problems[0].message
    tool.write(TWO)
    assert problems(await detection.look()) == {"left": [], "right": []}


async def test_a_driver_that_hangs_delays_nobody_and_is_asked_once_until_it_answers() -> None:
    blocked = Blocked()
    healthy = Says(device(0, name="other"))
    detection = Detection([blocked, healthy], limit_s=1.0, patience_s=0.1)
    for _ in range(5):
        status = await detection.look()
        assert problems(status) == {"other": []}
        assert status.cpu_count >= 1
    assert blocked.looks == 1
    blocked.free.set()

    async def is_seen() -> bool:
        return "late" in problems(await detection.look())

    await eventually(is_seen, "the device that answered late")


async def test_a_device_whose_driver_hangs_is_well_until_the_limit_and_then_unwell() -> None:
    blocked = Blocked()
    blocked.free.set()
    detection = Detection([blocked], limit_s=2.0, patience_s=0.01)
    await detection.look()
    blocked.free.clear()
    assert problems(await detection.look()) == {"late": []}

    async def is_unwell() -> bool:
        return problems(await detection.look()) == {"late": [ProblemCode.TOOL]}

    await eventually(is_unwell, "a hang is a problem after the limit")
    blocked.free.set()

    async def is_well() -> bool:
        return problems(await detection.look()) == {"late": []}

    await eventually(is_well, "it answered")


class Says:
    """A detector that finds what it is given."""

    vendor = "says"

    def __init__(self, *found: Device) -> None:
        self.found = list(found)

    def look(self, tools: Tools) -> list[Device]:
        return self.found


def device(index: int = 0, total: int = 100, **more: object) -> Device:
    values = {"index": index, "vendor": "says", "type": "x", "memory_total_bytes": total, **more}
    return Device.model_validate(values)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (device(total=0), "device 0 is left out: it has 0 bytes of memory"),
        (device(total=10**30), "bytes of memory"),
        (device(index=-1), "device -1 is left out: its index is -1"),
    ],
)
async def test_a_device_that_cannot_be_is_left_out_with_a_sentence(
    caplog: pytest.LogCaptureFixture, given: Device, sentence: str
) -> None:
    status = await Detection([Says(given, device(7, name="good"))]).look()
    assert [one.name for one in status.gpu_devices] == ["good"]
    assert sentence in warnings(caplog)[0]


async def test_a_device_that_is_silent_from_the_beginning_is_named_with_its_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lost = DeviceProblem(code=ProblemCode.LOST, message="NVML: GPU is lost")
    silent = device(3, total=0).model_copy(update={"problems": [lost]})
    detection = Detection([Says(silent)])
    for _ in range(2):
        assert (await detection.look()).gpu_devices == []
    (said,) = warnings(caplog)
    assert said.endswith("device 3 is left out: NVML: GPU is lost")


async def test_devices_are_unwell_when_only_rubbish_is_left_of_what_was_said() -> None:
    says = Says(device(0, name="good"), device(1, total=0))
    detection = Detection([says])
    assert problems(await detection.look()) == {"good": []}
    says.found = [device(1, total=0)]
    assert problems(await detection.look()) == {"good": [ProblemCode.TOOL]}


async def test_values_that_cannot_be_are_not_told() -> None:
    given = device(
        memory_used_bytes=101, utilization_percent=float("nan"), temperature_celsius=900.0,
        power_watts=-1.0, name="\x1b[31mred\n" + "x" * 500,
    )  # fmt: skip
    (told,) = (await Detection([Says(given)]).look()).gpu_devices
    assert told.memory_used_bytes == 100
    assert (told.utilization_percent, told.temperature_celsius, told.power_watts) == (None,) * 3
    assert told.name.startswith("[31mredxx")
    assert len(told.name) < 300


async def test_two_devices_never_have_one_index(caplog: pytest.LogCaptureFixture) -> None:
    twice = Says(device(0, uuid="a"), device(0, uuid="b"), device(1, uuid="c"))
    again = Says(device(1, uuid="d"))
    status = await Detection([twice, again]).look()
    assert [one.uuid for one in status.gpu_devices] == ["a", "c"]
    assert len(warnings(caplog)) == 2


async def test_a_card_that_is_split_is_not_lost_and_neither_are_its_parts_when_it_is_whole() -> (
    None
):
    whole = device(0, uuid="GPU-1")
    parts = [device(100 + at, uuid=f"MIG-{at}", parent_uuid="GPU-1") for at in (0, 1)]
    says = Says(whole)
    detection = Detection([says])
    await detection.look()
    for found in (parts, parts[:1], [whole]):
        says.found = found
        assert (await detection.look()).gpu_devices == found


async def test_a_lost_card_is_listed_also_where_those_behind_it_move_up() -> None:
    cards = [device(at, uuid=name, name=name) for at, name in enumerate("abcd")]
    says = Says(*cards)
    detection = Detection([says])
    await detection.look()
    says.found = [device(at, uuid=name, name=name) for at, name in enumerate("acd")]
    for _ in range(2):
        status = await detection.look()
        assert [(one.index, one.name) for one in status.gpu_devices] == [*enumerate("acdb")]
        assert problems(status) == {"a": [], "c": [], "d": [], "b": [ProblemCode.LOST]}
        assert "as device 1 and" in status.gpu_devices[3].problems[0].message
    says.found = cards
    assert (await detection.look()).gpu_devices == cards


async def test_a_card_that_another_took_the_place_of_is_not_lost() -> None:
    says = Says(device(0, uuid="a"), device(1, uuid="b"))
    detection = Detection([says])
    await detection.look()
    says.found = [device(0, uuid="a"), device(1, uuid="new")]
    assert (await detection.look()).gpu_devices == says.found


async def test_a_device_that_says_it_is_lost_keeps_what_was_known_of_it() -> None:
    says = Says(device(0, uuid="a", name="card"), device(1, uuid="b"))
    detection = Detection([says])
    await detection.look()
    says.found[0] = device(0, total=0)
    status = await detection.look()
    assert (status.gpu_devices[0].name, status.gpu_devices[0].memory_total_bytes) == ("card", 100)
    assert [one.code for one in status.gpu_devices[0].problems] == [ProblemCode.LOST]
    assert status.gpu_devices[1].problems == []


async def test_a_device_of_any_vendor_that_is_too_hot_for_one_look_is_well() -> None:
    hot = DeviceProblem(code=ProblemCode.THERMAL, message="it is 100 °C hot")
    says = Says(device(0, name="card").model_copy(update={"problems": [hot]}))
    assert problems(await Detection([says]).look()) == {"card": []}


async def test_processes_are_named_by_whose_engine_they_are_and_the_largest_are_told() -> None:
    many = [DeviceProcess(pid=pid, memory_bytes=pid) for pid in range(1, 100)]
    detection = Detection([Says(device(processes=many))], owners=lambda _: {99: 7})
    (told,) = (await detection.look()).gpu_devices
    assert told.processes[0] == DeviceProcess(pid=99, memory_bytes=99, instance_id=7)
    assert [one.pid for one in told.processes[1:3]] == [98, 97]
    assert len(told.processes) == 16


def test_a_tool_that_never_stops_printing_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    tools = Tools(limit_s=60)
    with pytest.raises(ToolFailed, match="printed more than 512 KiB"):
        tools.run("sh", "-c", f"sleep 60 & echo $! > {pids}; echo $$ >> {pids}; exec cat /dev/zero")
    first, second = (int(pid) for pid in pids.read_text().split())
    soon(lambda: not any(map(platform.start_ticks, (first, second))), "both have ended")


def test_a_tool_that_ignores_every_signal_but_one_is_ended_in_time(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = f"trap '' TERM INT HUP; echo $$ > {pid}; while :; do sleep 60; done"
    with pytest.raises(ToolFailed, match="did not end within 1 s"):
        Tools(limit_s=1.0).run("sh", "-c", script)
    assert platform.start_ticks(int(pid.read_text())) is None


def test_a_tool_is_told_no_setting_of_ours_and_asked_for_english(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GPUSTACK_TOKEN", "hunter2")
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    monkeypatch.setenv("ROCM_PATH", "/opt/rocm")
    said = Tools().run("env")
    assert "hunter2" not in said
    assert "LC_ALL=C.UTF-8" in said
    assert "ROCM_PATH=/opt/rocm" in said


def test_what_a_tool_says_to_both_outputs_is_read_whole() -> None:
    out = "x" * 300_000
    said = Tools().run(
        sys.executable, "-c", "import sys; sys.stderr.write('e' * 300_000); print('x' * 300_000)"
    )
    assert said == out + "\n"


def test_a_tool_that_leaves_a_process_with_its_outputs_behind_is_not_waited_for() -> None:
    assert Tools(limit_s=30).run("sh", "-c", "sleep 3 & echo done") == "done\n"
