"""A Hub's files on this machine, fetched when they are not here."""

import asyncio
import contextlib
import glob
import hashlib
import os
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from gpustack.errors import Forbidden, Invalid, NotFound, Unavailable
from gpustack.hub.splits import choose, parts
from gpustack.lib import platform
from gpustack.lib.secrets import Secret
from gpustack.lib.text import plain
from gpustack.schemas.models import ModelSource

if TYPE_CHECKING:
    from gpustack.hub.huggingface import Hub, RemoteFile

Progress = Callable[[float], None]

#: A file system's 255, less what a download adds to a name (`_place`).
MAX_NAME_BYTES = 255 - len(".0123456789abcdef.part")


async def fetch(
    spec: ModelSource,
    cache_dir: Path,
    *,
    token: Secret | None,
    progress: Progress,
    endpoint: str | None = None,
    pause_s: float = 1.0,
) -> Path:
    """Where the model's file is, or the first of its parts; all of them are there, and whole.

    A download is resumed where an earlier one ended, checked against the Hub's checksum and
    moved into place at once. Files that are here need no network. Cancelling keeps what is there.

    Args:
        progress: told the share that is here, percent.
        endpoint: of the Hub, for tests; None: HF_ENDPOINT's, or the public one.
        pause_s: the first wait after a broken connection.

    Raises:
        NotFound: no such repository or file.
        Forbidden: the repository is gated or private.
        Unavailable: the Hub cannot be reached, or sent what is not the file.
        OSError: a file cannot be written; the message names it.
    """
    repo, wanted = spec.huggingface_repo_id or "", spec.huggingface_filename
    folder = _below(cache_dir / "huggingface", repo)
    if wanted is not None and await asyncio.to_thread(_complete, folder, wanted):
        return _below(folder, parts(wanted)[0])
    from gpustack.hub.huggingface import Hub  # httpx: only where it is needed

    async with Hub(token, endpoint=endpoint, pause_s=pause_s) as hub:
        return await _download(hub, repo, wanted, folder, progress)


def remove(spec: ModelSource, cache_dir: Path) -> None:
    """Have nothing of the model's files here, nor of what a download of them left. Blocks.

    Raises:
        Invalid: nobody knows which of several are meant.
        Forbidden: they lie elsewhere, behind a link that somebody put into the cache.
        OSError: a file cannot be removed; the message names it.
    """
    repo, wanted = spec.huggingface_repo_id or "", spec.huggingface_filename
    folder = _below(cache_dir / "huggingface", repo)
    try:
        names = choose(_present(folder), wanted, repo)
    except NotFound:  # not all of it is here, or nothing
        names = parts(wanted) if wanted else []
    paths = [_below(folder, name) for name in names]
    if any(not path.parent.resolve().is_relative_to(cache_dir.resolve()) for path in paths):
        raise Forbidden(
            f"{folder} leads out of the cache directory {cache_dir}: remove it yourself"
        )
    for path in paths:
        path.unlink(missing_ok=True)
        for part in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
            part.unlink(missing_ok=True)
    folders = {path.parent for path in paths} | {folder, folder.parent}
    for empty in sorted(folders, key=lambda one: len(one.parts), reverse=True):
        with contextlib.suppress(OSError):  # others are in it
            empty.rmdir()


async def _download(
    hub: "Hub", repo: str, wanted: str | None, folder: Path, progress: Progress
) -> Path:
    """Fetch what of the model is not in `folder` yet."""
    from gpustack.hub.huggingface import Interrupted

    try:
        remote = {file.path: file for file in await hub.files(repo)}
    except Interrupted:
        here = await asyncio.to_thread(_present, folder)
        with contextlib.suppress(NotFound, Invalid):
            return _below(folder, choose(here, wanted, repo)[0])
        raise
    files = [remote[name] for name in choose(list(remote), wanted, repo)]
    total, done = sum(file.size for file in files) or 1, 0
    for file in files:

        def report(have: int, before: int = done) -> None:
            progress(min(100.0, 100 * (before + have) / total))

        await _place(hub, repo, file, _below(folder, file.path), report)
        done += file.size

    return _below(folder, files[0].path)


async def _place(
    hub: "Hub", repo: str, file: "RemoteFile", path: Path, report: Callable[[int], None]
) -> None:
    """Return once the whole file stands at `path`."""
    if not await asyncio.to_thread(path.exists):
        # Named after the content: what is left of another version is never continued.
        part = path.with_name(f"{path.name}.{(file.sha256 or str(file.size))[:16]}.part")
        await asyncio.to_thread(part.parent.mkdir, parents=True, exist_ok=True)
        with await asyncio.to_thread(part.open, "ab") as held:
            await _locked(held)
            if not await asyncio.to_thread(path.exists):
                await hub.download(repo, file, held, report)
                held.flush()
                await asyncio.to_thread(_accept, part, path, file)
    report(file.size)


async def _locked(part: BinaryIO) -> None:
    """Wait until no other process downloads into `part`."""
    while not platform.lock(part):  # noqa: ASYNC110  another process cannot set our events
        await asyncio.sleep(0.5)


def _accept(part: Path, path: Path, remote: "RemoteFile") -> None:
    """Move a finished download into place.

    Raises:
        Unavailable: it is not what the Hub announced. It is removed, so the next try begins anew.
    """
    problem = ""
    with part.open("rb") as file:
        if part.stat().st_size != remote.size:
            problem = f"{part.stat().st_size} bytes instead of {remote.size}"
        elif remote.sha256 and _sha256(file) != remote.sha256:
            problem = "a content with another checksum"
        os.fsync(file.fileno())
    if problem:
        part.unlink()
        raise Unavailable(f"the Hub sent {problem} for {path.name}; it will be fetched again")
    os.replace(part, path)


def _sha256(file: BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _below(folder: Path, name: str) -> Path:
    """`name` in `folder`.

    Raises:
        NotFound: it would lie elsewhere.
    """
    pieces = name.split("/")
    if plain(name) != name or "\\" in name or {"", "..", "."} & set(pieces):
        raise NotFound(f"{name!r} names no repository or file of a Hub")
    if any(len(os.fsencode(piece)) > MAX_NAME_BYTES for piece in pieces):
        raise NotFound(f"{pieces[-1][:40]}… is a longer name than a file here can have")
    return folder / name


def _complete(folder: Path, wanted: str) -> bool:
    return all(_below(folder, name).is_file() for name in parts(wanted))


def _present(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.gguf") if p.is_file())
