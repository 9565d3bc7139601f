"""Tools of others that engines are run with: fetched, checked, carried to where no network is.

For now llama-box. Nothing that is not exactly what its release announced is unpacked.
"""

import asyncio
import hashlib
import io
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, BinaryIO, Self

import httpx

from gpustack.errors import Invalid, NotFound, Unavailable
from gpustack.hub import llama_box
from gpustack.hub.llama_box import RELEASES, SUMS, Build
from gpustack.hub.proxies import ProxiedTransport
from gpustack.lib.net import without_credentials

UPSTREAM = "https://github.com"
#: Attempts in a row that bring no byte, before a download is given up.
ATTEMPTS = 5
CHUNK_BYTES = 1 << 20
#: Far above any build: the largest are some 600 MB, unpacked twice that, in some 20 files.
MAX_BUILD_BYTES, MAX_UNPACKED_BYTES, MAX_FILES = 4 << 30, 8 << 30, 1000
MAX_SUMS_BYTES = 1 << 20


class Releases:
    """Where releases are fetched from, through the proxies that the environment names.

    Args:
        base_url: of GitHub or of a mirror that has the same paths.
        pause_s: the first wait after a broken connection; it doubles.
    """

    def __init__(self, base_url: str = UPSTREAM, *, pause_s: float = 1.0) -> None:
        self._base_url = base_url.rstrip("/")
        self._shown = without_credentials(self._base_url)
        self._pause_s = pause_s
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(30, connect=10),
            follow_redirects=True,
            transport=ProxiedTransport(),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def published(self, version: str) -> dict[str, str]:
        """The release's files and their SHA-256, hex.

        Raises:
            NotFound: no such release.
            Unavailable: it cannot be had, or says nothing that sha256sum would write.
        """
        text = io.BytesIO()
        await self._fetch(f"{version}/{SUMS}", text, MAX_SUMS_BYTES, lambda _: None)
        return llama_box.sums(text.getvalue().decode(errors="replace"))

    async def fetch(self, build: Build, out: BinaryIO, progress: Callable[[int], None]) -> None:
        """Write the build's zip into `out`, which is empty; broken connections are taken up again.

        Args:
            progress: told how many bytes are there.

        Raises:
            NotFound: the release has no such file.
            Unavailable: it cannot be had, or is not what the release announced.
        """
        await self._fetch(build.path, out, MAX_BUILD_BYTES, progress)
        out.seek(0)
        if (got := await asyncio.to_thread(_sha256, out)) != build.sha256:
            raise Unavailable(
                f"{self._shown} sends another {build.name} than its {SUMS} announces: SHA-256 "
                f"{got} instead of {build.sha256}"
            )

    async def _fetch(
        self, path: str, out: IO[bytes], limit: int, progress: Callable[[int], None]
    ) -> None:
        url, failures = f"{self._base_url}/{RELEASES}/{path}", 0
        while True:
            have = out.tell()
            try:
                return await self._append(url, out, limit, progress)
            except (httpx.InvalidURL, UnicodeError) as error:
                raise Unavailable(f"no request can be sent to {self._shown}: {error}") from error
            except httpx.HTTPError as error:
                failures = 1 if out.tell() > have else failures + 1
                if failures >= ATTEMPTS:
                    why = str(error) or type(error).__name__
                    raise Unavailable(
                        f"cannot fetch {without_credentials(url)}: {why}; without a network, use "
                        "--load-archive"
                    ) from error
            await asyncio.sleep(self._pause_s * 2 ** (failures - 1))

    async def _append(
        self, url: str, out: IO[bytes], limit: int, progress: Callable[[int], None]
    ) -> None:
        have, shown = out.tell(), without_credentials(url)
        sent = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        async with self._http.stream("GET", url, headers=sent) as answer:
            if answer.status_code == 416 and have:
                return  # all of it is there
            if answer.status_code == 404:
                raise NotFound(f"there is no {shown}")
            if answer.status_code >= 500 or answer.status_code == 429:
                answer.raise_for_status()
            if not answer.is_success:
                raise Unavailable(f"{shown} answered {answer.status_code}")
            hops = {one.url.scheme for one in (*answer.history, answer)}
            if url.startswith("https:") and hops != {"https"}:
                raise Unavailable(f"{shown} leads to an address without TLS")
            if have and answer.status_code != 206:
                out.truncate(0)  # a server that ignores the range sends all of it
                out.seek(0)
            async for chunk in answer.aiter_raw(CHUNK_BYTES):
                if out.tell() + len(chunk) > limit:
                    raise Unavailable(f"{shown} is larger than {limit} bytes")
                await asyncio.to_thread(out.write, chunk)
                progress(out.tell())


def install(archive: BinaryIO, build: Build, bin_dir: Path) -> Path:
    """Make the build's program `<bin_dir>/llama-box_<version>`, at once, and answer that path.

    A build of one file is that file. One with libraries of its own is a folder beside it, and the
    name a link into it. What had the name before is replaced; a folder of another build stays,
    since engines may run out of it.

    Args:
        archive: its zip, checked.

    Raises:
        Unavailable: the zip is not one that a release would have.
        OSError: a file cannot be written; the message names it.
    """
    bin_dir.mkdir(parents=True, exist_ok=True)
    target = bin_dir / f"llama-box_{build.version}{Path(build.program).suffix}"
    with tempfile.TemporaryDirectory(dir=bin_dir, prefix=".llama-box-") as made:
        scratch = Path(made)
        content = scratch / "content"
        content.mkdir(mode=0o755)
        files = unpack(archive, content)
        if build.program not in files:
            raise Unavailable(f"{build.name} has no {build.program}")
        ready = scratch / "ready"
        if len(files) == 1:
            os.replace(content / build.program, ready)
        else:
            home = bin_dir / f"llama-box_{build.version}-{build.sha256[:12]}"
            if not home.exists():
                os.rename(content, home)
            ready.symlink_to(PurePosixPath(home.name, build.program))
        os.replace(ready, target)
    return target


def unpack(archive: BinaryIO, folder: Path) -> list[str]:
    """Put the zip's files into the empty `folder`, executable, and answer their names.

    Raises:
        Unavailable: one would lie elsewhere, is a link or there twice, or there is too much.
    """
    files: list[str] = []
    left = MAX_UNPACKED_BYTES
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = [entry for entry in opened.infolist() if not entry.is_dir()]
            if len(entries) > MAX_FILES:
                raise Unavailable(f"the zip has over {MAX_FILES} files")
            for entry in entries:
                path = folder / _inside(entry)
                path.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(entry) as source, path.open("xb") as out:
                    left -= _copy(source, out, left)
                    os.fsync(out.fileno())
                path.chmod(0o755)
                files.append(entry.filename)
    except FileExistsError as error:
        raise Unavailable(f"the zip has {Path(error.filename).name} twice") from None
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        raise Unavailable(f"the zip cannot be unpacked: {error}") from error
    return files


def _inside(entry: zipfile.ZipInfo) -> PurePosixPath:
    """Where in its folder the entry goes."""
    path = PurePosixPath(entry.filename)
    kind = stat.S_IFMT(entry.external_attr >> 16)
    plain = not path.is_absolute() and not {"..", ""} & set(entry.filename.split("/"))
    if not plain or set('\\:*?"<>|\0') & set(entry.filename):
        raise Unavailable(f"the zip has a file that would lie elsewhere: {entry.filename[:80]!r}")
    if kind not in (0, stat.S_IFREG):
        raise Unavailable(f"the zip has {entry.filename[:80]!r}, which is no regular file")
    return path


def _copy(source: IO[bytes], out: IO[bytes], limit: int) -> int:
    """Copy all of `source`, at most `limit` bytes; answers how many."""
    total = 0
    while chunk := source.read(CHUNK_BYTES):
        total += len(chunk)
        if total > limit:
            raise Unavailable(f"there is more in it than {MAX_UNPACKED_BYTES} bytes")
        out.write(chunk)
    return total


def save(archive: BinaryIO, build: Build, path: Path) -> None:
    """Write a tar file that `load` reads, at once.

    In it are the build's zip and its checksum, which `sha256sum -c` can check as well.

    Raises:
        OSError: it cannot be written; the message names it.
    """
    line = f"{build.sha256}  {build.path}\n".encode()
    size = archive.seek(0, os.SEEK_END)
    archive.seek(0)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        whole = Path(scratch) / "archive"
        with whole.open("xb") as out:
            with tarfile.open(fileobj=out, mode="w") as tar:
                for name, length, source in (
                    (SUMS, len(line), io.BytesIO(line)),
                    (build.path, size, archive),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = length
                    tar.addfile(member, source)
            out.flush()
            os.fsync(out.fileno())
        os.replace(whole, path)


@contextmanager
def load(path: Path) -> Iterator[tuple[Build, BinaryIO]]:
    """The build in a file that `save` wrote, and its zip, checked.

    Raises:
        Invalid: it is no such file, or the zip is not what the checksum in it says.
        OSError: it cannot be read; the message names it.
    """
    with tempfile.TemporaryFile() as out:
        try:
            with tarfile.open(path, mode="r:") as tar:
                build = _announced(tar, path)
                member = tar.next()
                if member is None or member.name != build.path or not member.isreg():
                    raise Invalid(f"{path} lacks {build.path}, which its {SUMS} names")
                source = tar.extractfile(member)
                if source is None or member.size > MAX_BUILD_BYTES:
                    raise Invalid(f"{path}: {build.name} is too large")
                shutil.copyfileobj(source, out, CHUNK_BYTES)
        except tarfile.TarError:
            raise Invalid(f"{path} is no archive of `gpustack download-tools`") from None
        out.seek(0)
        if _sha256(out) != build.sha256:
            raise Invalid(f"{path} is damaged: {build.name} has another SHA-256 than {SUMS} says")
        yield build, out


def _announced(tar: tarfile.TarFile, path: Path) -> Build:
    """What the archive's checksum file says is in it."""
    first = tar.next()
    wrong = Invalid(
        f"{path} is no archive of `gpustack download-tools`: {SUMS} does not come first"
    )
    if first is None or first.name != SUMS or not first.isreg() or first.size > MAX_SUMS_BYTES:
        raise wrong
    text = tar.extractfile(first)
    try:
        ((name, digest),) = llama_box.sums(text.read().decode() if text else "").items()
        version, _, file = name.partition("/")
        build = Build(llama_box.checked_version(version), file, digest)
        if not build.system:
            raise wrong
    except (ValueError, KeyError, Unavailable, Invalid):
        raise wrong from None
    return build


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    file.seek(0)
    return digest.hexdigest()
