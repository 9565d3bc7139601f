import asyncio
import os
from pathlib import Path

from gpustack.schemas.instances import InstanceState
from gpustack.worker.log_keeping import cut_long, keep_logs, remove_oldest
from gpustack.worker.supervisor.engine_log import log_path, previous_path, serve_dir, start_log
from tests.support.control_plane import ControlPlane, assigned
from tests.support.worker_node import Node, eventually


def test_a_log_that_is_too_long_goes_on_from_its_beginning(tmp_path: Path) -> None:
    path = log_path(tmp_path, 3)
    fd = start_log(path)
    os.write(fd, b"x" * 500 + b"y" * 1000)
    cut_long(serve_dir(tmp_path), 1000)
    os.write(fd, b"after")
    os.close(fd)
    assert path.read_bytes() == b"after"
    assert previous_path(path).read_bytes() == b"y" * 1000
    assert previous_path(path).stat().st_mode & 0o777 == 0o600
    assert len(list(path.parent.iterdir())) == 2
    cut_long(serve_dir(tmp_path), 1000)
    assert path.read_bytes() == b"after"


def test_a_log_is_cut_also_when_nothing_of_it_can_be_kept(tmp_path: Path) -> None:
    path = log_path(tmp_path, 3)
    os.close(start_log(path))
    path.write_bytes(bytes(2000))
    previous_path(path).mkdir()
    cut_long(serve_dir(tmp_path), 1000)
    assert path.stat().st_size == 0


def test_logs_of_instances_that_are_gone_stay_but_only_the_newest(tmp_path: Path) -> None:
    folder = serve_dir(tmp_path)
    folder.mkdir()
    for id in range(1, 10):
        for name in (f"{id}.log", f"{id}.log.1"):
            (folder / name).touch()
            os.utime(folder / name, (id, id))
    remove_oldest(folder, {1, 2}, 6)
    left = sorted(path.name for path in folder.iterdir())
    assert left == [f"{id}.log{more}" for id in (1, 2, 7, 8, 9) for more in ("", ".1")]
    remove_oldest(tmp_path / "none", set(), 6)


async def test_logs_are_looked_after_while_engines_write(tmp_path: Path) -> None:
    path = log_path(tmp_path, 3)
    old = path.with_name("4.log")
    async with asyncio.TaskGroup() as group:
        keeper = group.create_task(
            keep_logs(tmp_path, lambda: {3}, max_bytes=1000, kept_files=0, every_s=0.02)
        )
        fd = start_log(path)
        old.touch()
        for _ in range(3):
            os.write(fd, b"x" * 1500)
            await eventually(lambda: path.stat().st_size == 0)
        await eventually(lambda: not old.exists())
        keeper.cancel()
    os.close(fd)


async def test_an_agent_keeps_the_logs_of_what_it_runs(node: Node, plane: ControlPlane) -> None:
    folder = node.data_dir / "log/serve"
    folder.mkdir(parents=True)
    for id in range(1000, 1150):
        (folder / f"{id}.log").touch()
    async with node.agent():
        await plane.assign(assigned(1, node.spec()))
        await plane.until_state(1, InstanceState.RUNNING)
        await eventually(lambda: len(list(folder.iterdir())) == 101)
    assert (folder / "1.log").exists()
