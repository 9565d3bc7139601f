"""Downloads against a Hub on loopback."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gpustack.errors import Forbidden, GPUStackError, Invalid, NotFound, Unavailable
from gpustack.hub import huggingface
from gpustack.hub.files import fetch
from gpustack.lib.secrets import Secret
from gpustack.schemas.models import Source, VersionSpec
from tests.support.fake_hub import FakeHub, fake_hub


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


ENTRY = {"type": "file", "path": "a.gguf", "size": 1}


@pytest.mark.parametrize(
    "entry",
    [
        {"type": "file", "size": 1},
        ENTRY | {"path": 1},
        ENTRY | {"path": "\ud800"},
        ENTRY | {"size": "many"},
        ENTRY | {"size": True},
        ENTRY | {"size": -1},
        ENTRY | {"lfs": "yes"},
        ENTRY | {"lfs": {"oid": "../../../etc/passwd"}},
        ENTRY | {"lfs": {"oid": "A" * 64}},
        ENTRY | {"lfs": {"size": 1}},
        "a.gguf",
        None,
    ],
)
async def test_a_list_with_an_entry_that_no_hub_lists_is_refused(
    entry: object, hub: FakeHub, cache: Path
) -> None:
    hub.listing = json.dumps([entry]).encode()
    with pytest.raises(Unavailable, match="does not speak"):
        await get(hub, cache, "org/one", "a.gguf")


async def test_a_list_nested_without_end_is_refused(hub: FakeHub, cache: Path) -> None:
    hub.listing = b"[" * 200_000
    with pytest.raises(Unavailable, match="does not speak"):
        await get(hub, cache, "org/one", "a.gguf")


@pytest.mark.parametrize("name", ["a\0b.gguf", "x" * 240 + ".gguf", "a//b.gguf"])
async def test_a_name_that_no_file_here_can_have_is_one_sentence(
    name: str, hub: FakeHub, cache: Path
) -> None:
    hub.repos["org/odd"] = {name: b"x"}
    with pytest.raises(NotFound) as caught:
        await get(hub, cache, "org/odd")
    assert "\0" not in str(caught.value)


@pytest.mark.parametrize("token", ["schlüssel", "two words", "line\nend", ""])
async def test_a_token_that_no_header_can_hold_is_said_without_showing_it(
    token: str, hub: FakeHub, cache: Path
) -> None:
    with pytest.raises(Invalid, match="--huggingface-token") as caught:
        await get(hub, cache, "org/one", "one.gguf", token=Secret(token))
    assert not token or token not in str(caught.value)
    assert not hub.requests


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:99999", "hub", "ftp://hub", "http://", "http://:80"]
)
async def test_an_endpoint_that_is_no_address_is_said(address: str, cache: Path) -> None:
    with pytest.raises(Invalid, match="HF_ENDPOINT"):
        await get(FakeHub(url=address), cache, "org/one", "one.gguf")


async def test_the_token_is_shown_to_no_other_host(hub: FakeHub, cache: Path) -> None:
    with fake_hub() as other:
        for following in (f"{other.url}/api/models/org/one", "//127.0.0.1:1/x", "http://[x"):
            hub.following = following
            with pytest.raises(Unavailable, match="at another address"):
                await get(hub, cache, "org/one", "one.gguf", token=Secret("hf_secret"))
        assert not other.requests
    assert set(hub.tokens) == {"Bearer hf_secret"}


async def test_a_list_without_end_is_given_up(hub: FakeHub, cache: Path) -> None:
    hub.following = "/api/models/org/one/tree/main?cursor=0"
    with pytest.raises(Unavailable, match="over 100 pages"):
        await get(hub, cache, "org/one", "one.gguf")
    assert len(hub.requests) == 100


async def test_a_list_that_is_too_long_is_not_read_to_its_end(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface, "MAX_LISTING_BYTES", 1000)
    hub.listing = b"[" + b" " * 2000 + b"]"
    with pytest.raises(Unavailable, match="over 1000 bytes"):
        await get(hub, cache, "org/one", "one.gguf")


@pytest.mark.parametrize("excess", [1, 40_000_000])
async def test_more_than_was_announced_is_not_written(
    excess: int, hub: FakeHub, cache: Path, model: bytes
) -> None:
    hub.excess = bytes(excess)
    with pytest.raises(Unavailable, match=r"more for one\.gguf"):
        await get(hub, cache, "org/one", "one.gguf")
    assert [part.stat().st_size for part in leftovers(cache)] == [0]
    assert len(hub.ranges) == 1
    hub.excess = b""
    assert (await get(hub, cache, "org/one", "one.gguf")).read_bytes() == model
