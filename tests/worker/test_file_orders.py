"""Model files as the server wants them, and what it is told of them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from gpustack.client.agents import AgentClient
from gpustack.errors import Unavailable
from gpustack.lib.role import Leave
from gpustack.lib.secrets import Secret
from gpustack.schemas import wire
from gpustack.schemas.model_files import ModelFileState
from gpustack.schemas.models import ModelSource, Source
from gpustack.schemas.watch import WatchEvent
from gpustack.worker.file_orders import FileOrders
from gpustack.worker.file_reports import FileReports
from gpustack.worker.model_files import ModelFiles
from tests.support.control_plane import ControlPlane, model_file
from tests.support.fake_hub import FakeHub, fake_hub
from tests.support.worker_node import Node, eventually

DOWNLOADING, READY = ModelFileState.DOWNLOADING, ModelFileState.READY
ERROR, GONE = ModelFileState.ERROR, ModelFileState.GONE
ONE = ModelSource(
    source=Source.HUGGING_FACE, huggingface_repo_id="org/one", huggingface_filename="one.gguf"
)


class Stage:
    """An agent's half of model files, whose downloads end when the test says so."""

    def __init__(self, group: asyncio.TaskGroup, cache: Path) -> None:
        self.cache = cache
        self.fetched: list[str] = []
        self.deliver = asyncio.Event()
        self.error: Exception | None = None
        self.used: list[ModelSource] = []
        self.show: Callable[[float], None] = lambda _: None
        self.reports = FileReports(progress_s=0.05)
        self.files = ModelFiles(
            group, cache_dir=cache, token=None, worker_name="w", tell=self.reports.put,
            fetcher=self.fetch,
        )  # fmt: skip
        self.orders = FileOrders(group, self.files, self.reports, lambda: self.used)

    @property
    def file(self) -> Path:
        return self.cache / "huggingface/org/one/one.gguf"

    async def fetch(
        self,
        spec: ModelSource,
        cache_dir: Path,
        *,
        token: Secret | None,
        progress: Callable[[float], None],
    ) -> Path:
        self.fetched.append(spec.location)
        self.show = progress
        progress(10.0)
        await self.deliver.wait()
        if self.error:
            raise self.error
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_bytes(b"12345")
        return self.file

    async def talk(self, plane: ControlPlane) -> None:
        async with AgentClient(plane.url, plane.credential) as client, asyncio.TaskGroup() as group:
            group.create_task(self.reports.send(client, 1, first_s=0.01, limit_s=0.05))
            async with aclosing(client.follow([wire.MODEL_FILES])) as events:
                async for event in events:
                    self.orders.hear(event)


@asynccontextmanager
async def agent(plane: ControlPlane, cache: Path) -> AsyncIterator[Stage]:
    async with asyncio.TaskGroup() as group:
        stage = Stage(group, cache)
        talking = group.create_task(stage.talk(plane))
        yield stage
        talking.cancel()
        stage.orders.let_go()


async def test_what_is_asked_for_is_fetched_and_told(plane: ControlPlane, tmp_path: Path) -> None:
    async with agent(plane, tmp_path) as stage:
        await plane.ask(model_file(7))
        await plane.until_file(7, DOWNLOADING)
        stage.deliver.set()
        told = await plane.until_file(7, READY)
    assert (told.size, told.resolved_paths) == (5, [str(stage.file)])
    assert told.observed_generation == 1
    assert stage.fetched == ["org/one:one.gguf"]


async def test_progress_is_told_now_and_then(plane: ControlPlane, tmp_path: Path) -> None:
    async with agent(plane, tmp_path) as stage:
        await plane.ask(model_file(7))
        await plane.until(lambda: [s for _, s in plane.file_reports if s.download_progress == 10.0])
        before = len(plane.file_reports)
        for percent in range(20, 90):
            stage.show(float(percent))
        await plane.until(lambda: plane.file_reports[-1][1].download_progress == 89.0)
        assert len(plane.file_reports) == before + 1
        stage.deliver.set()
        await plane.until_file(7, READY)


async def test_a_failure_is_told_and_tried_anew_when_asked_again(
    plane: ControlPlane, tmp_path: Path
) -> None:
    async with agent(plane, tmp_path) as stage:
        stage.error = Unavailable("the hub is away")
        stage.deliver.set()
        await plane.ask(model_file(7))
        told = await plane.until_file(7, ERROR)
        assert told.state_message == "cannot fetch org/one:one.gguf: the hub is away"
        stage.error = None
        failed = plane.files[7]
        await plane.ask(failed.model_copy(update={"generation": 2, "state": DOWNLOADING}))
        told = await plane.until_file(7, READY)
    assert (told.observed_generation, len(stage.fetched)) == (2, 2)


async def test_what_an_engine_waits_for_gets_a_row(plane: ControlPlane, tmp_path: Path) -> None:
    async with agent(plane, tmp_path) as stage, asyncio.TaskGroup() as engines:
        engine = engines.create_task(stage.files.path(ONE, lambda _: None))
        await plane.until_file(1, DOWNLOADING)
        stage.deliver.set()
        assert await engine == stage.file
        await plane.until_file(1, READY)
    assert plane.files[1].location == "org/one:one.gguf"
    assert stage.fetched == ["org/one:one.gguf"]


async def test_a_download_that_no_engine_waits_for_any_more_is_told_as_stopped(
    plane: ControlPlane, tmp_path: Path
) -> None:
    async with agent(plane, tmp_path) as stage, asyncio.TaskGroup() as engines:
        engine = engines.create_task(stage.files.path(ONE, lambda _: None))
        await plane.until_file(1, DOWNLOADING)
        engine.cancel()
        told = await plane.until_file(1, ERROR)
    assert "its download was stopped: nothing waits for it" in told.state_message


async def test_a_row_that_is_deleted_ends_its_download_and_is_not_made_again(
    plane: ControlPlane, tmp_path: Path
) -> None:
    async with agent(plane, tmp_path) as stage:
        await plane.ask(model_file(7))
        await plane.until_file(7, DOWNLOADING)
        await plane.forget(7)
        await eventually(lambda: not stage.files._fetches)
        await plane.ask(model_file(8, huggingface_filename="two.gguf"))
        await plane.until_file(8, DOWNLOADING)
        assert list(plane.files) == [8]


async def test_a_row_that_an_agent_missed_the_end_of_is_not_made_again(
    plane: ControlPlane, tmp_path: Path
) -> None:
    async with agent(plane, tmp_path) as stage:
        await plane.ask(model_file(7))
        stage.deliver.set()
        await plane.until_file(7, READY)
        stage.orders.hear(_event("resync"))
        stage.orders.hear(_event("synced"))
        assert not stage.reports.knows(ONE)


async def test_an_earlier_agents_download_goes_on_and_what_it_had_is_looked_for(
    plane: ControlPlane, tmp_path: Path
) -> None:
    there = tmp_path / "there.gguf"
    there.write_bytes(b"123")
    done = {"state": READY, "observed_generation": 1}
    plane.files = {
        1: model_file(1, observed_generation=1),
        2: model_file(2, huggingface_filename="b", resolved_paths=[str(there)], **done),
        3: model_file(3, huggingface_filename="c", resolved_paths=["/nowhere/c"], **done),
        4: model_file(4, huggingface_filename="d", **done | {"state": ERROR}),
    }
    async with agent(plane, tmp_path / "cache") as stage:
        await plane.until_file(1, DOWNLOADING)
        assert (await plane.until_file(2, READY)).size == 3
        assert "No such file" in (await plane.until_file(3, ERROR)).state_message
    assert stage.fetched == ["org/one:one.gguf"]
    assert 4 not in [id for id, _ in plane.file_reports]


async def test_a_local_path_is_looked_for(plane: ControlPlane, tmp_path: Path) -> None:
    local = {"source": "local_path", "huggingface_repo_id": None, "huggingface_filename": None}
    (tmp_path / "m.gguf").write_bytes(b"12")
    async with agent(plane, tmp_path / "cache"):
        await plane.ask(model_file(1, **local, local_path=str(tmp_path / "m.gguf")))
        assert (await plane.until_file(1, READY)).size == 2
        await plane.ask(model_file(2, **local, local_path=str(tmp_path)))
        assert (await plane.until_file(2, READY)).size == 2
        await plane.ask(model_file(3, **local, local_path="/nowhere"))
        told = await plane.until_file(3, ERROR)
    assert told.state_message == "file not found: /nowhere on worker w"


async def test_a_file_is_removed_once_no_instance_here_uses_it(
    plane: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpustack.worker.file_orders.AGAIN_S", 0.01)
    async with agent(plane, tmp_path) as stage:
        stage.deliver.set()
        await plane.ask(model_file(7))
        await plane.until_file(7, READY)
        stage.used = [ONE.model_copy(update={"huggingface_filename": "*.gguf"})]
        await plane.ask(plane.files[7].model_copy(update={"generation": 2, "deleting": True}))
        await eventually(lambda: stage.orders._tasks)
        assert stage.file.exists()
        stage.used = []
        await plane.until_file(7, GONE)
    assert not stage.file.exists()
    assert plane.files == {}


async def test_a_file_that_cannot_be_removed_is_told_and_kept(
    plane: ControlPlane, tmp_path: Path
) -> None:
    async with agent(plane, tmp_path) as stage:
        stage.file.mkdir(parents=True)  # a folder in its place
        (stage.file / "other").touch()
        await plane.ask(model_file(7, generation=2, observed_generation=1, deleting=True))
        told = await plane.until_file(7, ERROR)
    assert told.state_message.startswith("cannot remove org/one:one.gguf: ")
    assert list(plane.files) == [7]


async def test_a_server_in_trouble_is_told_later(plane: ControlPlane, tmp_path: Path) -> None:
    plane.refuse["PUT /v2/model-files/7/status"] = 503
    async with agent(plane, tmp_path) as stage:
        stage.deliver.set()
        await plane.ask(model_file(7))
        await plane.until(lambda: plane.refused >= 2)
        plane.refuse.clear()
        await plane.until_file(7, READY)


def _event(type: str) -> WatchEvent:
    return WatchEvent.model_validate({"type": type})


# --- whole agents ----------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as made:
        made.repos["org/one"] = {"one.gguf": b"GGUF" + bytes(1000)}
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        yield made


async def test_an_agent_fetches_ahead_and_cleans_up(
    node: Node, plane: ControlPlane, hub: FakeHub
) -> None:
    file = node.data_dir / "cache/huggingface/org/one/one.gguf"
    plane.files[1] = model_file(1)
    async with node.agent():
        told = await plane.until_file(1, READY)
        assert (told.size, told.resolved_paths) == (1004, [str(file)])
        assert file.read_bytes() == hub.repos["org/one"]["one.gguf"]
    async with node.agent(leave=Leave.ORPHANED):
        await plane.ask(plane.files[1].model_copy(update={"generation": 2, "deleting": True}))
        await plane.until_file(1, GONE)
    assert not file.exists()


async def test_an_agent_that_leaves_amid_a_download_lets_the_next_go_on(
    node: Node, plane: ControlPlane, hub: FakeHub
) -> None:
    hub.broken = True
    plane.files[1] = model_file(1)
    async with node.agent():
        await plane.until_file(1, DOWNLOADING)
    hub.broken = False
    assert plane.files[1].state is DOWNLOADING
    async with node.agent():
        await plane.until_file(1, READY)
