"""llama-box's releases: which build, whether it is the right one, and what becomes of it."""

import hashlib
import io
import os
import stat
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpustack.errors import GPUStackError, Invalid, NotFound, Unavailable
from gpustack.hub import llama_box, tools
from gpustack.hub.llama_box import SUMS, Build, Machine, choose
from gpustack.hub.tools import Releases
from tests.support.certificate import issue
from tests.support.fake_releases import FakeReleases, fake_releases, zipped

V = "v0.0.171"
#: As the release has them, in part.
NAMES = [
    "dl-llama-box-darwin-arm64-metal.zip",
    "dl-llama-box-linux-amd64-cpu.zip",
    "dl-llama-box-linux-amd64-cuda-12.4.zip",
    "dl-llama-box-linux-amd64-cuda-12.8.zip",
    "llama-box-darwin-arm64-metal.zip",
    "llama-box-linux-amd64-avx2.zip",
    "llama-box-linux-amd64-avx512.zip",
    "llama-box-linux-amd64-cuda-12.4.zip",
    "llama-box-linux-amd64-cuda-12.8.zip",
    "llama-box-linux-amd64-hip-6.2.zip",
    "llama-box-linux-amd64-musa-rc4.0.zip",
    "llama-box-linux-arm64-cann-8.0-310p.zip",
    "llama-box-linux-arm64-cann-8.0.zip",
    "llama-box-linux-arm64-cann-8.1.rc1.zip",
    "llama-box-linux-arm64-neon.zip",
    "dl-llama-box-windows-amd64-cpu.zip",
    "llama-box-windows-amd64-avx2.zip",
    SUMS,
]
PUBLISHED = dict.fromkeys(NAMES, "0" * 64)


@pytest.mark.parametrize(
    ("system", "arch", "device", "runtime", "static", "name"),
    [
        ("linux", "amd64", "cpu", None, False, "dl-llama-box-linux-amd64-cpu"),
        ("linux", "amd64", "cpu", None, True, "llama-box-linux-amd64-avx2"),
        ("linux", "arm64", "cpu", None, False, "llama-box-linux-arm64-neon"),
        ("linux", "amd64", "cuda", None, False, "dl-llama-box-linux-amd64-cuda-12.4"),
        ("linux", "amd64", "cuda", (12, 6), False, "dl-llama-box-linux-amd64-cuda-12.4"),
        ("linux", "amd64", "cuda", (13, 0), False, "dl-llama-box-linux-amd64-cuda-12.8"),
        ("linux", "amd64", "cuda", (13, 0), True, "llama-box-linux-amd64-cuda-12.8"),
        ("linux", "amd64", "cuda-12.4", (13, 0), False, "dl-llama-box-linux-amd64-cuda-12.4"),
        ("linux", "amd64", "rocm", None, False, "llama-box-linux-amd64-hip-6.2"),
        ("linux", "amd64", "musa", None, False, "llama-box-linux-amd64-musa-rc4.0"),
        ("linux", "arm64", "npu", None, False, "llama-box-linux-arm64-cann-8.0"),
        ("linux", "arm64", "npu", (8, 0), False, "llama-box-linux-arm64-cann-8.0"),
        ("linux", "arm64", "cann-8.0-310p", None, False, "llama-box-linux-arm64-cann-8.0-310p"),
        ("darwin", "arm64", "mps", None, False, "dl-llama-box-darwin-arm64-metal"),
        ("windows", "amd64", "cpu", None, False, "llama-box-windows-amd64-avx2"),
    ],
)
def test_the_build_for_a_machine(
    system: str, arch: str, device: str, runtime: tuple[int, ...] | None, static: bool, name: str
) -> None:
    found = choose(V, PUBLISHED, Machine(system, arch, device, runtime), static=static)
    assert found.name == f"{name}.zip"
    assert (found.system, found.arch) == (system, arch)
    assert found.program == ("llama-box.exe" if system == "windows" else "llama-box")


@pytest.mark.parametrize(
    ("machine", "error", "words"),
    [
        (Machine("linux", "amd64", "tpu"), Invalid, "--device: want one of cuda, npu, "),
        (Machine("linux", "amd64", "dcu"), NotFound, "there are: cpu, cuda-12.4, cuda-12.8, avx2"),
        (Machine("linux", "amd64", "cuda-11.8"), NotFound, "with cuda-11.8; there are"),
        (Machine("linux", "amd64", "cuda", (12, 2)), NotFound, "the driver runs up to 12.2"),
        (Machine("linux", "riscv64", "cpu"), NotFound, "none for this system and architecture"),
    ],
)
def test_a_machine_without_a_build_is_told_what_there_is(
    machine: Machine, error: type[GPUStackError], words: str
) -> None:
    with pytest.raises(error) as caught:
        choose(V, PUBLISHED, machine)
    assert words in str(caught.value)


def test_versions_that_would_lead_elsewhere_are_none() -> None:
    assert llama_box.checked_version("v0.0.171") == "v0.0.171"
    for wrong in ("0.0.171", "v1", "../x", "v0.0.1/../..", "v0.0.1\n", ""):
        with pytest.raises(Invalid, match="want a release such as"):
            llama_box.checked_version(wrong)


@pytest.fixture
def releases() -> Iterator[FakeReleases]:
    with fake_releases() as made:
        made.files[f"{V}/llama-box-linux-amd64-avx2.zip"] = zipped(
            {"llama-box": os.urandom(3 << 20)}
        )
        yield made


async def fetched(releases: FakeReleases, out: io.BytesIO) -> Build:
    async with Releases(releases.url, pause_s=0.01) as one:
        published = await one.published(V)
        build = choose(V, published, Machine("linux", "amd64", "cpu"))
        await one.fetch(build, out, lambda _: None)
        return build


@pytest.mark.parametrize("ignore_ranges", [False, True])
async def test_a_build_arrives_whole_however_often_it_is_cut(
    releases: FakeReleases, ignore_ranges: bool
) -> None:
    releases.cuts, releases.ignore_ranges = [1 << 20, 0, 0, 1 << 20, 5], ignore_ranges
    out = io.BytesIO()
    build = await fetched(releases, out)
    assert out.getvalue() == releases.files[build.path]
    assert (releases.asked[2][1] is not None) or ignore_ranges


async def test_what_is_not_as_announced_is_refused(releases: FakeReleases) -> None:
    (path,) = releases.files
    name = path.partition("/")[2]
    releases.sums = f"{'1' * 64}  {name}\n".encode()
    with pytest.raises(Unavailable, match=f"sends another {name} than its sha256sum"):
        await fetched(releases, io.BytesIO())
    releases.sums = b"<html>"
    with pytest.raises(Unavailable, match="want lines of `sha256sum`"):
        await fetched(releases, io.BytesIO())
    releases.sums, releases.files = None, {}
    with pytest.raises(NotFound, match=f"there is no {releases.url}/gpustack/llama-box/releases"):
        await fetched(releases, io.BytesIO())


async def test_a_host_that_cannot_be_reached_says_what_to_do() -> None:
    async with Releases("http://127.0.0.1:1", pause_s=0.001) as one:
        with pytest.raises(Unavailable, match=r"cannot fetch .*; without a network, use --load"):
            await one.published(V)
    async with Releases("http://é..x", pause_s=0.001) as one:
        with pytest.raises(Unavailable):
            await one.published(V)


async def test_a_mirrors_password_is_sent_and_never_shown(releases: FakeReleases) -> None:
    mirror = releases.url.replace("//", "//me:pass-word@")
    async with Releases(mirror, pause_s=0.001) as one:
        await one.published(V)
        releases.files.clear()
        with pytest.raises(NotFound) as caught:
            await one.published(V)
    assert releases.url in str(caught.value)
    assert "pass-word" not in str(caught.value)
    assert "Basic " in str(releases.credentials[0])


async def test_a_release_may_lie_elsewhere_but_not_without_tls(
    releases: FakeReleases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = releases.files
    releases.moved[path] = f"{releases.url}/elsewhere.zip"
    releases.files["/elsewhere.zip"] = releases.files[path]
    assert (await fetched(releases, io.BytesIO())).path == path
    certificate = issue(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.certfile))
    with fake_releases(certificate) as secure:
        secure.files[path] = releases.files[path]
        await fetched(secure, io.BytesIO())
        secure.moved[path] = f"{releases.url}/elsewhere.zip"
        with pytest.raises(Unavailable, match="leads to an address without TLS"):
            await fetched(secure, io.BytesIO())


async def test_a_download_larger_than_any_build_is_given_up(
    releases: FakeReleases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "MAX_BUILD_BYTES", 1 << 20)
    with pytest.raises(Unavailable, match="is larger than"):
        await fetched(releases, io.BytesIO())


def of(content: bytes, *, dynamic: bool = False) -> Build:
    name = f"{'dl-' if dynamic else ''}llama-box-linux-amd64-cpu.zip"
    return Build(V, name, hashlib.sha256(content).hexdigest())


def test_a_build_of_one_file_is_the_executable(tmp_path: Path) -> None:
    for text in ("#!/bin/sh\necho one\n", "#!/bin/sh\necho two\n"):
        content = zipped({"llama-box": text})
        path = tools.install(io.BytesIO(content), of(content), tmp_path / "bin")
        assert path == tmp_path / "bin/llama-box_v0.0.171"
        assert stat.S_IMODE(path.stat().st_mode) == 0o755
        done = subprocess.run([path], capture_output=True, text=True, check=True)
        assert done.stdout == text[15:]
    assert [one.name for one in (tmp_path / "bin").iterdir()] == [path.name]


def test_a_build_with_libraries_keeps_them_beside_its_program(tmp_path: Path) -> None:
    first = zipped({"llama-box": "#!/bin/sh\necho 1\n", "libx.so": "1"})
    second = zipped({"llama-box": "#!/bin/sh\necho 2\n", "lib/": "", "lib/libx.so": "2"})
    path = tools.install(io.BytesIO(first), of(first, dynamic=True), tmp_path)
    old = path.resolve()
    assert (old.parent / "libx.so").read_text() == "1"
    for content in (second, second):
        path = tools.install(io.BytesIO(content), of(content, dynamic=True), tmp_path)
    assert (path.resolve().parent / "lib/libx.so").read_text() == "2"
    assert subprocess.run([path], capture_output=True, check=True).stdout == b"2\n"
    assert old.exists()  # an engine may run out of it
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("files", "links", "words"),
    [
        ({"../llama-box": ""}, (), "would lie elsewhere"),
        ({"a/../../llama-box": ""}, (), "would lie elsewhere"),
        ({"/etc/llama-box": ""}, (), "would lie elsewhere"),
        ({"a\\b": ""}, (), "would lie elsewhere"),
        ({"C:x": ""}, (), "would lie elsewhere"),
        ({"llama-box": "/etc/passwd"}, ("llama-box",), "no regular file"),
        ({"other": ""}, (), "has no llama-box"),
        ({f"f{n}": "" for n in range(1002)}, (), "over 1000 files"),
    ],
)
def test_a_zip_that_no_release_would_have_leaves_nothing(
    files: dict[str, str | bytes], links: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    content = zipped(files, links=links)
    place = tmp_path / "a/b/bin"
    with pytest.raises(Unavailable, match=words):
        tools.install(io.BytesIO(content), of(content), place)
    assert list(place.iterdir()) == []
    assert {path.name for path in tmp_path.rglob("*")} == {"a", "b", "bin"}


def test_a_zip_that_is_broken_double_or_a_bomb_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as made:
        made.writestr("llama-box", "1")
        with pytest.warns(UserWarning, match="Duplicate"):
            made.writestr("llama-box", "2")
    for content, words in ((twice.getvalue(), "twice"), (b"no zip", "cannot be unpacked")):
        with pytest.raises(Unavailable, match=words):
            tools.install(io.BytesIO(content), of(content), tmp_path)
    bomb = zipped({"llama-box": bytes(9 << 20)})
    assert len(bomb) < 1 << 20
    monkeypatch.setattr(tools, "MAX_UNPACKED_BYTES", 8 << 20)
    with pytest.raises(Unavailable, match="more in it than"):
        tools.install(io.BytesIO(bomb), of(bomb), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_archive_is_carried_over_and_checked(tmp_path: Path) -> None:
    content = zipped({"llama-box": "x"})
    path = tmp_path / "tools.tar"
    tools.save(io.BytesIO(content), of(content), path)
    with tools.load(path) as (build, archive):
        assert build == of(content)
        assert archive.read() == content
    # Others can check it as well.
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path, filter="data")
    subprocess.run(["sha256sum", "-c", SUMS], cwd=tmp_path, check=True, capture_output=True)
    broken = path.read_bytes().replace(content, content[:-1] + b"?")
    path.write_bytes(broken)
    with pytest.raises(Invalid, match="is damaged"), tools.load(path):
        pass


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"other": b""},
        {SUMS: b"nonsense"},
        {SUMS: b"0" * 64 + b"  ../../x.zip\n"},
        {SUMS: b"0" * 64 + b"  v0.0.1/x.zip\n"},
        {SUMS: b"0" * 64 + b"  v0.0.1/llama-box-linux-amd64-cpu.zip\n"},
        {SUMS: b"0" * 64 + b"  v0.0.1/llama-box-linux-amd64-cpu.zip\n", "v0.0.1/other": b""},
        {SUMS: (b"0" * 64 + b"  v0.0.1/llama-box-linux-amd64-cpu.zip\n") * 2},
        None,
    ],
)
def test_a_file_that_is_no_archive_of_ours_is_said_so(
    members: dict[str, bytes] | None, tmp_path: Path
) -> None:
    path = tmp_path / "tools.tar"
    if members is None:
        path.write_bytes(b"no tar at all")
    else:
        with tarfile.open(path, "w") as tar:
            for name, content in members.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    with pytest.raises(Invalid, match=r"tools\.tar (is no archive|lacks)"), tools.load(path):
        pass
