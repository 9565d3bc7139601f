import asyncio
import os
from collections.abc import Callable
from contextlib import aclosing, closing
from pathlib import Path

import pytest

from gpustack.schemas.instances import InstanceState
from gpustack.worker import log_times
from gpustack.worker.log_keeping import Bounds, Watch, keep_logs, sweep
from gpustack.worker.log_reading import Run, followed, tail, whole
from gpustack.worker.supervisor.engine_log import (
    cut_path,
    log_path,
    runs_before,
    serve_dir,
    start_log,
    times_path,
)
from tests.support.control_plane import ControlPlane, assigned
from tests.support.worker_node import Node, eventually


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return log_path(tmp_path, 3)


def size(path: Path) -> int:
    return path.stat().st_size


async def text(run: Run, position: int | None = None) -> bytes:
    return b"".join([piece async for piece in whole(run, position or run.begins)])


async def test_a_log_that_is_too_long_goes_on_from_its_beginning(path: Path) -> None:
    watch, fd = Watch(path), start_log(path)
    os.write(fd, b"x" * 500 + b"y" * 1000)
    await watch.look(500)
    os.write(fd, b"after")
    await watch.look(500)
    assert size(path) == 5
    assert cut_path(path).read_bytes() == b"y" * 1000
    assert cut_path(path).stat().st_mode & 0o777 == 0o600
    assert {found.name for found in path.parent.iterdir()} == {"3.log", "3.log.cut", "3.log.times"}
    with closing(Run(path)) as run:
        assert (run.begins, run.ends) == (500, 1505)
        assert await text(run) == b"y" * 1000 + b"after"
    os.close(fd)


async def test_lines_are_counted_across_what_was_cut(path: Path) -> None:
    watch, fd = Watch(path), start_log(path)
    lines = [b"%d " % n + b"x" * (n * 7919 % 50_000) + b"\n" for n in range(40)]
    for n, line in enumerate(lines):
        os.write(fd, line)
        if n == 20:
            await watch.look(400_000)
    assert cut_path(path).exists()
    os.close(fd)
    with closing(Run(path)) as run:
        for count in (0, 1, 19, 20, 25):
            assert await text(run, await tail(run, count)) == b"".join(lines[40 - count :])
        assert await tail(run, 1000) == run.begins


async def test_a_follower_loses_nothing_when_a_log_is_cut_and_its_run_ends(path: Path) -> None:
    watch, fd = Watch(path), start_log(path)
    said = bytearray()

    def say(size: int) -> None:
        piece = os.urandom(size // 2).hex().encode()
        os.write(fd, piece)
        said.extend(piece)

    say(300_000)
    with closing(Run(path)) as run, closing(Run(path)) as other:
        async with aclosing(followed(path, run, 0, lambda: True)) as follower:
            got = bytearray(await anext(follower))
            await watch.look(250_000)
            assert size(path) == 0
            say(100_000)
            got += await anext(follower)  # of what was cut
            assert await text(other, 200_000) == said[200_000:]
            os.close(fd)
            fd = start_log(path)
            say(50_000)
            while len(got) < len(said):
                got += await anext(follower)
        assert got == said
        assert await text(other, 200_000) == said[200_000:400_000]  # of the run that is over
    os.close(fd)


async def test_who_is_further_behind_than_anything_is_kept_goes_on_with_what_is(path: Path) -> None:
    watch, fd = Watch(path), start_log(path)
    with closing(Run(path)) as run:
        os.write(fd, b"a" * 1500)
        await watch.look(500)
        os.write(fd, b"b" * 1500)
        await watch.look(500)
        os.write(fd, b"c" * 100)
        assert run.read(0, 10_000) == (2000, b"b" * 1000)
        assert run.read(3000, 10_000) == (3000, b"c" * 100)
    os.close(fd)


async def test_a_log_that_somebody_else_empties_is_read_from_its_beginning(path: Path) -> None:
    watch, fd = Watch(path), start_log(path)
    os.write(fd, b"x" * 1500)
    await watch.look(1000)
    os.write(fd, b"y" * 500)
    await watch.look(1000)
    with closing(Run(path)) as run:
        end = run.ends
        os.truncate(path, 0)
        os.write(fd, b"new")
        assert run.read(end, 100) == (1500, b"new")
        await watch.look(1000)
        assert await text(run) == b"new"
        assert not cut_path(path).exists()
        assert log_times.read(path).base == 0
    os.close(fd)


@pytest.mark.parametrize("beside", [cut_path, times_path])
async def test_a_log_is_cut_also_when_nothing_of_it_can_be_kept(
    path: Path, beside: Callable[[Path], Path]
) -> None:
    watch, fd = Watch(path), start_log(path)
    os.write(fd, bytes(2000))
    os.close(fd)
    beside(path).mkdir()
    with pytest.raises(IsADirectoryError):
        await watch.look(1000)
    assert size(path) == 0


async def test_another_agent_goes_on_where_the_one_before_was(path: Path) -> None:
    fd = start_log(path)
    for _ in range(3):
        os.write(fd, b"x" * 1500)
        await Watch(path).look(1000)
    os.write(fd, b"end")
    os.close(fd)
    with closing(Run(path)) as run:
        assert (run.begins, run.ends) == (3000, 4503)


async def test_times_cover_the_whole_run_and_stay_small(path: Path) -> None:
    os.close(start_log(path))
    log_times.note(path, 0.0, 50)
    log_times.note(path, 0.5, 100, begins=True)
    for second in range(1, 6_000):
        log_times.note(path, float(second), 100 + second * 10)
    assert times_path(path).stat().st_size <= log_times.LIMIT_BYTES
    times = log_times.read(path)
    assert times.base == 100
    for ago in (1, 100, 1000, 5_900):
        at = 6_000 - ago
        found = times.position(at, 10**9)
        assert found is not None
        assert 100 + at * 10 - 10 * 5 * ago <= found <= 100 + at * 10
    assert times.position(-1, 10**9) is None
    assert times.position(5_999, 50) is None  # it has been emptied since


async def test_times_are_those_of_the_bytes_also_after_a_cut(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, fd = Watch(path), start_log(path)
    now = 1000.0
    monkeypatch.setattr("time.time", lambda: now)
    for line in range(100):
        os.write(fd, b"%d %s\n" % (line, b"x" * 95))
        now += 1
        await watch.look(3000)
    os.close(fd)
    with closing(Run(path)) as run:
        for ago in (0.5, 1, 10, 30):
            lines = (await text(run, run.since(ago))).splitlines()
            first = 100 - int(ago)
            assert int(lines[0].split()[0]) in (first - 1, first) if lines else ago == 0.5
        assert run.since(90) == run.begins


def test_logs_of_instances_that_are_gone_stay_but_only_the_newest(tmp_path: Path) -> None:
    folder = serve_dir(tmp_path)
    folder.mkdir()

    def left() -> list[str]:
        return sorted(path.name for path in folder.iterdir())

    for id in range(1, 10):
        for name in (f"{id}.log", f"{id}.log.1"):
            (folder / name).write_bytes(bytes(100))
            os.utime(folder / name, (id, id))
    sweep(folder, {1, 2}, Bounds(gone=4))
    assert left() == [f"{id}.log{more}" for id in (1, 2, 6, 7, 8, 9) for more in ("", ".1")]
    sweep(folder, {1, 2}, Bounds(gone_bytes=500))
    assert left() == [f"{id}.log{more}" for id in (1, 2, 8, 9) for more in ("", ".1")]
    sweep(tmp_path / "none", set(), Bounds())


def test_earlier_runs_stay_as_far_as_there_is_room_and_the_newest_always(path: Path) -> None:
    def left() -> list[int]:
        return [int(run.suffix[1:]) for run in runs_before(path)]

    for _ in range(10):
        fd = start_log(path)
        os.write(fd, bytes(100))
        os.close(fd)
        times_path(path).touch()
    sweep(path.parent, {3}, Bounds(runs=7))
    assert left() == [9, 8, 7, 6, 5, 4, 3]
    sweep(path.parent, {3}, Bounds(runs_bytes=350))
    assert left() == [9, 8, 7]
    sweep(path.parent, {3}, Bounds(runs_bytes=1))
    assert left() == [9]
    assert {found.name for found in path.parent.glob("*.times")} == {
        "3.log.times", "3.log.9.times"
    }  # fmt: skip


async def test_logs_are_looked_after_while_engines_write(tmp_path: Path, path: Path) -> None:
    old = path.with_name("4.log")
    bounds = Bounds(log_bytes=1000, gone=0, look_s=0.02, sweep_s=0.02)
    async with asyncio.TaskGroup() as group:
        keeper = group.create_task(keep_logs(tmp_path, lambda: {3}, bounds))
        fd = start_log(path)
        old.touch()
        for _ in range(3):
            os.write(fd, b"x" * 1500)
            await eventually(lambda: size(path) == 0)
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
        await eventually(lambda: len(list(folder.glob("1???.log"))) == 100)
    assert (folder / "1.log").exists()


async def test_each_failed_start_has_a_log_of_its_own(node: Node, plane: ControlPlane) -> None:
    path = log_path(node.settings.log_dir, 1)
    async with node.agent():
        await plane.assign(assigned(1, node.spec("exit=3")))
        await eventually(lambda: len(runs_before(path)) >= 2)
    said = [run.read_text() for run in runs_before(path)]
    assert all(text.count("started") == 1 and "magic mismatch" in text for text in said)
    assert len({text.split()[1] for text in said}) == len(said)  # each of its own process
