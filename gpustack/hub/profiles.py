"""What a model's own files say of it, without loading them."""

import asyncio
import io
from pathlib import Path

from gpustack.errors import GPUStackError, NotFound
from gpustack.hub import gguf
from gpustack.hub.splits import choose, parts
from gpustack.lib.secrets import Secret
from gpustack.schemas.models import Source, VersionSpec
from gpustack.schemas.profiles import Profile

#: How much of a remote file is read, tried in this order; few headers need the last.
BEGINNINGS_BYTES = (1 << 20, 8 << 20, 64 << 20)


async def profile(
    spec: VersionSpec, *, token: Secret | None = None, endpoint: str | None = None
) -> Profile:
    """The facts of the model that `spec` names.

    Files whose header cannot be read have a profile too: their size, and `problem`.

    Args:
        endpoint: of the Hub, for tests; None: HF_ENDPOINT's, or the public one.

    Raises:
        NotFound: no such path, repository or file.
        Forbidden: the repository is gated or private.
        Unavailable: the Hub cannot be reached.
    """
    if spec.source is Source.LOCAL_PATH:
        return await asyncio.to_thread(_local, Path(spec.local_path or ""))
    return await _remote(spec, token, endpoint)


def _local(path: Path) -> Profile:
    try:
        if path.is_dir():
            files = [file for file in path.rglob("*") if file.is_file()]
            size = sum(file.stat().st_size for file in files)
            return Profile(weights_bytes=size, source="sizes of the files in the folder")
        names = parts(path.name)
        sizes = {name: path.with_name(name).stat().st_size for name in names}
        with path.with_name(names[0]).open("rb") as file:
            return _of(file, sizes[names[0]], sum(sizes.values()), whole=len(names) == 1)
    except FileNotFoundError as error:
        raise NotFound(f"file not found: {error.filename}") from None
    except OSError as error:
        return Profile(weights_bytes=0, problem=f"{path} cannot be read: {error.strerror}")


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
        weights = (header.tensor_bytes or total) if whole else total
        found = gguf.profile(header, weights_bytes=weights, source=source)
    except gguf.Short:
        if isinstance(file, io.BytesIO) and len(file.getbuffer()) < size:
            raise  # more of it can be had
        return _unread(total, gguf.Short())
    except gguf.Broken as error:
        return _unread(total, error)
    if header.end > size:
        problem = f"the file is cut: {size} bytes of at least {header.end}"
        return found.model_copy(update={"problem": problem})
    return found


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
