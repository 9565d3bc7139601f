"""What a watch cannot be told, it is ended for: it comes again, and begins where it must."""

import pytest

from gpustack.schemas import wire
from gpustack.server.db import history
from gpustack.server.feed import Feed
from gpustack.server.views import ADMIN, load_ids
from tests.server.conftest import Plane
from tests.server.test_feed import KINDS, Watch, add


async def test_what_was_pruned_before_this_server_read_it_is_listed_anew(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was frozen or cut off while another server changed much."""
    heard: list[tuple[str, int]] = []
    behind = Feed(plane.db, "epoch", lambda kind, row_id: heard.append((kind, row_id)))
    assert await behind._begun()
    watch = Watch(behind.watch(KINDS, ADMIN))
    await watch.until("synced")
    await add(plane, "a", "b", "c")
    monkeypatch.setattr(history, "KEPT_REVISIONS", 2)
    await history.prune(plane.db)
    await behind._advance()
    with pytest.raises(StopAsyncIteration):
        await watch.until("never")
    assert (wire.CREDENTIALS, 0) in heard  # whatever was remembered of them is forgotten
    again = Watch(behind.watch(KINDS, ADMIN, since=watch.cursor))
    monkeypatch.undo()  # what controllers do next is more than that
    assert (await again.next())["type"] == "resync"
    assert [one["data"]["name"] for one in await again.until("synced")] == ["a", "b", "c"]
    (model,) = await add(plane, "d")
    await behind._advance()
    assert (await again.of(model))["data"]["name"] == "d"


async def test_a_watch_from_before_the_first_look_of_the_feed_misses_nothing(plane: Plane) -> None:
    """Else what was committed between its list and that look would be told to nobody."""
    early = Feed(plane.db, "epoch", lambda *_: None)
    watch = Watch(early.watch(KINDS, ADMIN))
    await watch.until("synced")
    (model,) = await add(plane, "a")
    assert await early._begun()
    await early._advance()
    assert (await watch.of(model))["data"]["name"] == "a"


async def test_more_objects_are_looked_for_than_a_query_has_parameters(plane: Plane) -> None:
    """PostgreSQL's driver takes 32,767. A watch that was away may have missed more."""
    ids = await add(plane, "a", "b")
    async with plane.db.read() as session:
        found = await load_ids(session, wire.MODELS, range(40_000))
    assert [one.id for one in found] == ids
