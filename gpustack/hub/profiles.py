"""What a model's own files say of it, without loading them."""

import asyncio
import contextlib
import io
import os
import stat
import threading
import time
from pathlib import Path

from gpustack.errors import GPUStackError, Invalid, NotFound, Unavailable
from gpustack.hub import gguf
from gpustack.hub.splits import choose, parts
from gpustack.lib.secrets import Secret
from gpustack.lib.text import plain
from gpustack.schemas.models import Source, VersionSpec
from gpustack.schemas.profiles import Profile

#: How much of a remote file is read, tried in this order; few headers need the last.
BEGINNINGS_BYTES = (1 << 20, 8 << 20, 64 << 20)
#: Seconds for a file or folder of this machine, and how many are read at once.
READ_S, READERS = 30.0, 16

FOLDER = "sizes of the files in the folder"

_readers = threading.BoundedSemaphore(READERS)


async def profile(
    spec: VersionSpec, *, token: Secret | None = None, endpoint: str | None = None
) -> Profile:
    """The facts of the model that `spec` names.

    Files whose header cannot be read have a profile too: their size, and `problem`.

    Args:
        endpoint: of the Hub, for tests; None: HF_ENDPOINT's, or the public one.

    Raises:
        NotFound: no such path, repository or file.
        Invalid: the path is neither a folder nor a regular file.
        Forbidden: the repository is gated or private.
        Unavailable: the Hub cannot be reached, or the disk does not answer.
    """
    if spec.source is Source.LOCAL_PATH:
        return await _in_time(Path(spec.local_path or ""))
    return await _remote(spec, token, endpoint)


async def _in_time(path: Path) -> Profile:
    """`_local` in a thread of its own.

    A file system that hangs cannot be given up by its reader: such a thread holds up nothing else,
    not even the end of this program, and there are few.
    """
    loop = asyncio.get_running_loop()
    found: asyncio.Future[Profile] = loop.create_future()

    def settle(result: Profile | Exception) -> None:
        if found.cancelled():
            return
        if isinstance(result, Exception):
            found.set_exception(result)
        else:
            found.set_result(result)

    def read() -> None:
        result: Profile | Exception
        try:
            result = _local(path, time.monotonic() + READ_S)
        except Exception as error:  # noqa: BLE001  whoever waits is told
            result = error
        finally:
            _readers.release()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, result)

    if not _readers.acquire(blocking=False):
        raise Unavailable(f"{path} cannot be read now: {READERS} other files are being read")
    threading.Thread(target=read, name="profile", daemon=True).start()
    try:
        async with asyncio.timeout(READ_S):
            return await found
    except TimeoutError:
        raise Unavailable(_too_slow(path)) from None


def _too_slow(path: Path) -> str:
    return f"{path} could not be read within {READ_S:g} s"


def _local(path: Path, deadline: float) -> Profile:
    try:
        if path.is_dir():
            return Profile(weights_bytes=_weight(path, deadline), source=FOLDER)
        names = parts(path.name)
        sizes = {name: _size(path.with_name(name)) for name in names}
        # Not blocking: it may have become a pipe since.
        with open(path.with_name(names[0]), "rb", opener=_unblocked) as file:
            _check(path, os.fstat(file.fileno()))
            return _of(file, sizes[names[0]], sum(sizes.values()), whole=len(names) == 1)
    except FileNotFoundError as error:
        raise NotFound(f"file not found: {error.filename}") from None
    except OSError as error:
        return Profile(weights_bytes=0, problem=f"{path} cannot be read: {error.strerror}")
    except ValueError:  # a zero byte in the name
        raise NotFound(f"file not found: {plain(str(path))}") from None


def _weight(folder: Path, deadline: float) -> int:
    """Bytes of all regular files in it."""
    total = 0
    for file in folder.rglob("*"):
        if time.monotonic() > deadline:
            raise Unavailable(_too_slow(folder))
        with contextlib.suppress(FileNotFoundError):  # gone since, or a link to nothing
            found = file.stat()
            total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


def _size(path: Path) -> int:
    found = path.stat()
    _check(path, found)
    return found.st_size


def _check(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise Invalid(f"{path} is neither a regular file nor a folder")


def _unblocked(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has none


def _of(file: io.BufferedReader | io.BytesIO, size: int, total: int, *, whole: bool) -> Profile:
    """The profile by the header that `file` begins with.

    Args:
        size: of the file, bytes.
        total: of all its parts.
        whole: it is the only part, so its header tells of every tensor.
    """
    source = "GGUF header" if whole else "GGUF header, sizes of the parts"
    try:
        header = gguf.read(file, size)
        problem = _excess(header, size)
        weights = header.tensor_bytes if whole and not problem else None
        found = gguf.profile(header, weights_bytes=weights or total, source=source)
    except gguf.Short:
        if isinstance(file, io.BytesIO) and len(file.getbuffer()) < size:
            raise  # more of it can be had
        return _unread(total, gguf.Short())
    except gguf.Broken as error:
        return _unread(total, error)
    return found.model_copy(update={"problem": problem})


def _excess(header: gguf.Header, size: int) -> str:
    """What the header claims beyond the `size` bytes that there are; "": nothing."""
    if header.end > size:
        return f"the file is cut: {size} bytes of at least {header.end}"
    if (header.tensor_bytes or 0) > size:
        return f"its header claims {header.tensor_bytes} bytes of tensors, the file has {size}"
    return ""


def _unread(size: int, error: GPUStackError) -> Profile:
    problem = f"the GGUF header cannot be read: {error}"
    return Profile(weights_bytes=size, source="size on disk", problem=problem)


async def _remote(spec: VersionSpec, token: Secret | None, endpoint: str | None) -> Profile:
    from gpustack.hub.huggingface import Hub  # httpx: only where it is needed

    repo = spec.huggingface_repo_id or ""
    async with Hub(token, endpoint=endpoint) as hub:
        remote = {file.path: file for file in await hub.files(repo)}
        files = [remote[name] for name in choose(list(remote), spec.huggingface_filename, repo)]
        first, total = files[0], sum(file.size for file in files)
        for count in BEGINNINGS_BYTES:
            content = io.BytesIO(await hub.beginning(repo, first.path, count))
            try:
                return await asyncio.to_thread(
                    _of, content, first.size, total, whole=len(files) == 1
                )
            except gguf.Short:
                continue
    return _unread(total, gguf.Broken(f"it is longer than {BEGINNINGS_BYTES[-1]} bytes"))
