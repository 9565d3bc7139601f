"""What is removed from the cache, and what never is."""

import os
from pathlib import Path

import pytest

from gpustack.errors import Forbidden, Invalid, NotFound
from gpustack.hub.files import remove
from gpustack.hub.splits import share_files
from gpustack.schemas.models import ModelSource, Source


def source(repo: str, file: str | None = None) -> ModelSource:
    return ModelSource(
        source=Source.HUGGING_FACE, huggingface_repo_id=repo, huggingface_filename=file
    )


def fill(cache: Path, *names: str) -> None:
    for name in names:
        path = cache / "huggingface" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def left(cache: Path) -> list[str]:
    found = (cache / "huggingface").rglob("*")
    return sorted(p.relative_to(cache / "huggingface").as_posix() for p in found if p.is_file())


def test_a_file_goes_with_its_parts_and_what_downloads_left_of_it(tmp_path: Path) -> None:
    parts = [f"org/m/s-{n:05d}-of-00002.gguf" for n in (1, 2)]
    fill(tmp_path, *parts, f"{parts[1]}.0123456789abcdef.part", "org/m/other.gguf", "org/n/o.gguf")
    remove(source("org/m", "s-00001-of-00002.gguf"), tmp_path)
    assert left(tmp_path) == ["org/m/other.gguf", "org/n/o.gguf"]


@pytest.mark.parametrize("wanted", ["*Q4*.gguf", "m-Q4.gguf"])
def test_a_pattern_means_what_a_download_would_find(tmp_path: Path, wanted: str) -> None:
    fill(tmp_path, "org/m/m-Q4.gguf", "org/m/m-Q8.gguf")
    remove(source("org/m", wanted), tmp_path)
    assert left(tmp_path) == ["org/m/m-Q8.gguf"]


def test_a_source_that_might_mean_several_files_removes_none(tmp_path: Path) -> None:
    fill(tmp_path, "org/m/a.gguf", "org/m/b.gguf")
    with pytest.raises(Invalid, match="has 2 files that GGUF means"):
        remove(source("org/m"), tmp_path)
    assert left(tmp_path) == ["org/m/a.gguf", "org/m/b.gguf"]


def test_what_is_not_there_is_removed_already(tmp_path: Path) -> None:
    remove(source("org/m", "m.gguf"), tmp_path)
    fill(tmp_path, "org/m/m.gguf")
    remove(source("org/m"), tmp_path)
    assert left(tmp_path) == []
    assert not (tmp_path / "huggingface/org").exists()


def test_nothing_outside_the_cache_is_removed(tmp_path: Path) -> None:
    cache, elsewhere = tmp_path / "cache", tmp_path / "home"
    elsewhere.mkdir()
    (elsewhere / "m.gguf").write_bytes(b"x")
    (cache / "huggingface/org").mkdir(parents=True)
    os.symlink(elsewhere, cache / "huggingface/org/m")
    with pytest.raises(Forbidden, match="leads out of the cache directory"):
        remove(source("org/m", "m.gguf"), cache)
    for repo, file in (("../../home", "m.gguf"), ("org/n", "../../../../home/m.gguf")):
        with pytest.raises(NotFound):
            remove(source(repo, file), cache)
    assert (elsewhere / "m.gguf").exists()


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("m.gguf", "m.gguf", True),
        ("m.gguf", "n.gguf", False),
        ("m.gguf", None, True),
        ("m-Q4.gguf", "*Q4*", True),
        ("m-Q8.gguf", "*Q4*", False),
        ("*Q8*", "*Q4*", True),  # nobody knows
        ("s-00001-of-00002.gguf", "s-00002-of-00002.gguf", True),
        ("s-00001-of-00002.gguf", "*-00002-of-*", True),
    ],
)
def test_two_sources_share_files_unless_they_cannot(
    one: str | None, other: str | None, shared: bool
) -> None:
    assert share_files(source("org/m", one), source("org/m", other)) is shared
    assert share_files(source("org/m", other), source("org/m", one)) is shared
    assert not share_files(source("org/m", one), source("org/n", other))
    local = ModelSource(source=Source.LOCAL_PATH, local_path="/m.gguf")
    assert not share_files(source("org/m", one), local)
    assert share_files(local, local)
