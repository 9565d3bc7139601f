import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from gpustack.schemas import wire
from gpustack.schemas.models import Source, VersionSpec
from gpustack.schemas.watch import EventType, WatchEvent
from gpustack.worker.desired import Desired
from tests.support.control_plane import assigned

SPEC = VersionSpec(source=Source.LOCAL_PATH, local_path="/m.gguf")

MADE_AT = datetime(2026, 1, 1, tzinfo=UTC)


def put(id: int, **more: Any) -> WatchEvent:
    instance = assigned(id, SPEC, secret="s", created_at=MADE_AT, **more)
    content = json.loads(instance.model_dump_json())
    return WatchEvent(type=EventType.PUT, kind=wire.INSTANCES, id=id, data=content)


RESYNC = WatchEvent(type=EventType.RESYNC)
SYNCED = WatchEvent(type=EventType.SYNCED)


def heard(tmp_path: Path, *events: WatchEvent) -> Desired:
    desired = Desired(tmp_path / "desired.json")
    for event in events:
        desired.hear(event)
    return desired


def test_what_a_whole_list_leaves_out_is_gone_and_only_then(tmp_path: Path) -> None:
    desired = heard(tmp_path, RESYNC, put(1), put(2), SYNCED, RESYNC, put(2))
    assert set(desired.instances) == {1, 2}
    desired.hear(SYNCED)
    assert set(desired.instances) == {2}


def test_the_end_of_a_resumed_history_makes_nothing_gone(tmp_path: Path) -> None:
    desired = heard(tmp_path, RESYNC, put(1), SYNCED, put(2), SYNCED)
    assert set(desired.instances) == {1, 2}


def test_a_history_without_a_list_is_no_sync(tmp_path: Path) -> None:
    assert not heard(tmp_path, put(1), SYNCED).synced
    assert heard(tmp_path, RESYNC, SYNCED).synced


def test_what_was_heard_is_there_after_a_restart_but_not_as_a_list(tmp_path: Path) -> None:
    heard(tmp_path, RESYNC, put(1, generation=3), SYNCED).save()
    again = heard(tmp_path)
    again.load()
    assert again.instances[1].generation == 3
    assert again.instances[1].secret == "s"
    assert not again.synced
    assert (tmp_path / "desired.json").stat().st_mode & 0o777 == 0o600


def test_an_echo_of_our_own_report_is_not_worth_a_write(tmp_path: Path) -> None:
    desired = heard(tmp_path, RESYNC, put(1), SYNCED)
    desired.save()
    written = (tmp_path / "desired.json").stat().st_ino
    desired.hear(put(1, state="running", port=4000, pid=5, restart_count=2))
    desired.save()
    assert (tmp_path / "desired.json").stat().st_ino == written
    desired.hear(put(1, generation=2))
    desired.save()
    assert (tmp_path / "desired.json").stat().st_ino != written


def test_an_instance_that_cannot_be_understood_stays_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = WatchEvent(
        type=EventType.PUT, kind=wire.INSTANCES, id=1, data={"secret": "hush", "state": "new"}
    )
    desired = heard(tmp_path, RESYNC, put(1), SYNCED, RESYNC, odd, SYNCED)
    assert set(desired.instances) == {1}
    assert "cannot understand instance 1" in caplog.text
    assert "hush" not in caplog.text


@pytest.mark.parametrize("content", ["", "{", '{"1": {}}', "[]"])
def test_a_broken_file_is_no_reason_not_to_start(tmp_path: Path, content: str) -> None:
    (tmp_path / "desired.json").write_text(content)
    desired = heard(tmp_path)
    desired.load()
    assert desired.instances == {}
