"""Downloads against a Hub on loopback."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from gpustack.errors import Forbidden, GPUStackError, Invalid, NotFound, Unavailable
from gpustack.hub.files import fetch
from gpustack.lib.secrets import Secret
from gpustack.schemas.models import Source, VersionSpec
from tests.support.fake_hub import FakeHub


def spec(repo: str, file: str | None = None) -> VersionSpec:
    return VersionSpec(
        source=Source.HUGGING_FACE, huggingface_repo_id=repo, huggingface_filename=file
    )


async def get(
    hub: FakeHub,
    cache: Path,
    repo: str,
    file: str | None = None,
    *,
    token: Secret | None = None,
    progress: Callable[[float], None] = lambda percent: None,
) -> Path:
    return await fetch(
        spec(repo, file), cache, token=token, progress=progress, endpoint=hub.url, pause_s=0.01
    )


def leftovers(cache: Path) -> list[Path]:
    return list(cache.rglob("*.part"))


def arrived(cache: Path) -> list[Path]:
    return list(cache.rglob("*.gguf"))


async def test_a_file_arrives_whole_and_is_not_asked_for_again(
    hub: FakeHub, cache: Path, model: bytes
) -> None:
    seen: list[float] = []
    path = await get(hub, cache, "org/one", "one.gguf", progress=seen.append)
    assert path == cache / "huggingface/org/one/one.gguf"
    assert path.read_bytes() == model
    assert seen == sorted(seen)
    assert seen[-1] == 100
    assert not leftovers(cache)
    before = len(hub.requests)
    assert await get(hub, cache, "org/one", "one.gguf") == path
    assert len(hub.requests) == before


async def test_a_download_that_is_cut_again_and_again_is_continued(
    hub: FakeHub, cache: Path, model: bytes
) -> None:
    hub.cuts = [100_000, 200_000, 0, 0, 50_000]
    path = await get(hub, cache, "org/one", "one.gguf")
    assert path.read_bytes() == model
    assert hub.ranges == [
        None, "bytes=100000-", "bytes=300000-", "bytes=300000-", "bytes=300000-", "bytes=350000-",
    ]  # fmt: skip


async def test_a_later_call_continues_what_an_earlier_one_left(
    hub: FakeHub, cache: Path, model: bytes
) -> None:
    hub.cuts = [250_000, 0, 0, 0, 0, 0]
    with pytest.raises(Unavailable):
        await get(hub, cache, "org/one", "one.gguf")
    assert [part.stat().st_size for part in leftovers(cache)] == [250_000]
    hub.cuts, hub.ranges = [], []
    path = await get(hub, cache, "org/one", "one.gguf")
    assert path.read_bytes() == model
    assert hub.ranges == ["bytes=250000-"]
    assert not leftovers(cache)


async def test_a_server_without_ranges_sends_all_of_it_once_more(
    hub: FakeHub, cache: Path, model: bytes
) -> None:
    hub.cuts, hub.ignore_ranges = [250_000], True
    path = await get(hub, cache, "org/one", "one.gguf")
    assert path.read_bytes() == model


async def test_a_file_with_another_checksum_never_comes_into_place(
    hub: FakeHub, cache: Path
) -> None:
    hub.corrupt = True
    with pytest.raises(Unavailable, match="checksum"):
        await get(hub, cache, "org/one", "one.gguf")
    assert not arrived(cache)
    assert not leftovers(cache)


async def test_cancelling_keeps_what_is_there(hub: FakeHub, cache: Path, model: bytes) -> None:
    hub.repos["org/one"]["one.gguf"] = model * 40
    started = asyncio.Event()

    def progress(percent: float) -> None:
        started.set()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(get(hub, cache, "org/one", "one.gguf", progress=progress))
        await started.wait()
        task.cancel()
    assert task.cancelled()
    (part,) = leftovers(cache)
    assert 0 < part.stat().st_size < len(model * 40)
    path = await get(hub, cache, "org/one", "one.gguf")
    assert path.read_bytes() == model * 40
    assert hub.sent_bytes < 2 * len(model * 40)


async def test_two_who_want_the_same_file_fetch_it_once(
    hub: FakeHub, cache: Path, model: bytes
) -> None:
    async with asyncio.TaskGroup() as group:
        both = [group.create_task(get(hub, cache, "org/one", "one.gguf")) for _ in range(2)]
    assert {task.result() for task in both} == {cache / "huggingface/org/one/one.gguf"}
    assert len(hub.ranges) == 1


async def test_every_part_of_a_split_model_is_fetched(hub: FakeHub, cache: Path) -> None:
    seen: list[float] = []
    path = await get(hub, cache, "org/split", "*.gguf", progress=seen.append)
    assert path.name == "split-00001-of-00003.gguf"
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(hub.repos["org/split"])
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(100)


@pytest.mark.parametrize(
    ("repo", "file", "name"),
    [
        ("org/one", None, "one.gguf"),
        ("org/many", "*Q4_K_M.gguf", "many-Q4_K_M.gguf"),
        ("org/many", "sub dir/*.gguf", "many-F16.gguf"),
    ],
)
async def test_a_pattern_or_nothing_finds_the_only_file_that_it_means(
    repo: str, file: str | None, name: str, hub: FakeHub, cache: Path
) -> None:
    assert (await get(hub, cache, repo, file)).name == name
    hub.broken = True  # once here, no network is needed
    assert (await get(hub, cache, repo, file)).name == name


@pytest.mark.parametrize(
    ("repo", "file", "error", "words"),
    [
        ("org/none", "a.gguf", NotFound, "no repository org/none"),
        ("org/one", "One.gguf", NotFound, "the nearest is one.gguf"),
        ("org/many", None, Invalid, "has 3 files"),
        ("org/many", "*Q*.gguf", Invalid, "many-Q4_K_M.gguf, many-Q8_0.gguf"),
        ("org/gated", "g.gguf", Forbidden, "--huggingface-token"),
        ("org/text", None, NotFound, "no GGUF file"),
        ("org/lacks", "a-00001-of-00002.gguf", NotFound, "lacks a-00002-of-00002.gguf"),
        ("../../etc", "passwd", NotFound, "names no repository"),
        ("org/one", "../../x.gguf", NotFound, "names no repository or file"),
    ],
)
async def test_what_is_not_there_is_said_in_one_sentence(
    repo: str, file: str | None, error: type[GPUStackError], words: str, hub: FakeHub, cache: Path
) -> None:
    hub.repos |= {"org/gated": {"g.gguf": b"x"}, "org/text": {"a.txt": b"x"}}
    hub.repos["org/lacks"] = {"a-00001-of-00002.gguf": b"x"}
    hub.gated = {"org/gated"}
    with pytest.raises(error) as caught:
        await get(hub, cache, repo, file)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_a_token_opens_a_gated_repository(hub: FakeHub, cache: Path, model: bytes) -> None:
    hub.gated = {"org/one"}
    path = await get(hub, cache, "org/one", "one.gguf", token=Secret(hub.token))
    assert path.read_bytes() == model


async def test_without_a_network_the_sentence_says_what_helps(cache: Path) -> None:
    hub = FakeHub(url="http://127.0.0.1:9")
    with pytest.raises(Unavailable, match=r"cannot reach the Hugging Face Hub .* local_path"):
        await get(hub, cache, "org/one", "one.gguf")


async def test_a_server_that_is_no_hub_is_refused(hub: FakeHub, cache: Path) -> None:
    elsewhere = FakeHub(url=f"{hub.url}/org/one/resolve/main/README.md?")
    with pytest.raises(GPUStackError, match="does not speak"):
        await get(elsewhere, cache, "org/one", "one.gguf")


async def test_the_variable_hf_endpoint_is_honoured(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    path = await fetch(
        spec("org/one", "one.gguf"), cache, token=None, progress=lambda percent: None
    )
    assert path.exists()


async def test_a_local_path_is_taken_as_it_is(tmp_path: Path) -> None:
    here = tmp_path / "m.gguf"
    here.write_bytes(b"x")
    local = VersionSpec(source=Source.LOCAL_PATH, local_path=str(here))
    assert await fetch(local, tmp_path, token=None, progress=lambda percent: None) == here
    here.unlink()
    with pytest.raises(NotFound, match=r"m\.gguf"):
        await fetch(local, tmp_path, token=None, progress=lambda percent: None)
