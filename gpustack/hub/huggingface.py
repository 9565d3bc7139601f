"""The Hugging Face Hub's HTTP interface, as far as models need it: list, read, download.

Not `huggingface_hub`: since version 2 its downloads begin anew after every interruption, and a
download in a thread cannot be cancelled. See docs/decisions.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO, Self
from urllib.parse import quote

import httpx

from gpustack.errors import Forbidden, GPUStackError, NotFound, Unavailable
from gpustack.lib.secrets import Secret

ENDPOINT = "https://huggingface.co"
#: Attempts in a row that bring no byte, before a download is given up.
ATTEMPTS = 5
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        sha256: of its content; None for small files that are not in large-file storage.
    """

    path: str
    size: int
    sha256: str | None


class Interrupted(Unavailable):
    """The connection to the Hub broke."""


class Hub:
    """One server that speaks the Hub's interface.

    Args:
        endpoint: its address; None: HF_ENDPOINT's, or the public Hub.
        pause_s: the first wait after a broken connection; it doubles.
    """

    def __init__(
        self, token: Secret | None, *, endpoint: str | None = None, pause_s: float = 1.0
    ) -> None:
        address = endpoint or os.environ.get("HF_ENDPOINT") or ENDPOINT
        self.endpoint = address.rstrip("/")
        self._has_token = token is not None
        self._pause_s = pause_s
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {token.reveal()}"} if token else {},
            timeout=httpx.Timeout(30, connect=10),
            follow_redirects=True,  # to another host: without the token
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

    async def files(self, repo: str) -> list[RemoteFile]:
        """Every file of the repository's main branch.

        Raises:
            NotFound: no such repository.
            Forbidden: it is gated or private, and the token does not open it.
            Unavailable: the Hub does not answer.
        """
        found: list[RemoteFile] = []
        url: str | None = f"{self.endpoint}/api/models/{quote(repo)}/tree/main?recursive=true"
        while url:
            async with self._get(url, repo) as answer:
                await answer.aread()
                found += [_file(entry) for entry in _entries(answer) if entry["type"] == "file"]
                url = answer.links.get("next", {}).get("url")
        return found

    async def beginning(self, repo: str, path: str, count: int) -> bytes:
        """The file's first `count` bytes, or all if it has fewer."""
        content = bytearray()
        span = {"Range": f"bytes=0-{count - 1}"}
        async with self._get(self._url(repo, path), repo, span) as answer:
            async for chunk in answer.aiter_bytes(CHUNK_BYTES):
                content += chunk
                if len(content) >= count:  # a server that ignores the range
                    break
        return bytes(content[:count])

    async def download(
        self, repo: str, file: RemoteFile, out: BinaryIO, progress: Callable[[int], None]
    ) -> None:
        """Append to `out` what it lacks of the file; broken connections are taken up again.

        Args:
            out: opened for append, with what an earlier download left.
            progress: told how many bytes are there.

        Raises:
            Unavailable: the Hub gave nothing `ATTEMPTS` times in a row.
        """
        failures = 0
        while (have := out.tell()) < file.size:
            try:
                await self._append(repo, file, out, progress)
            except Interrupted:
                failures = 1 if out.tell() > have else failures + 1
                if failures >= ATTEMPTS:
                    raise
                await asyncio.sleep(self._pause_s * 2 ** (failures - 1))

    async def _append(
        self, repo: str, file: RemoteFile, out: BinaryIO, progress: Callable[[int], None]
    ) -> None:
        have = out.tell()
        span = {"Range": f"bytes={have}-"} if have else {}
        async with self._get(self._url(repo, file.path), repo, span) as answer:
            if have and answer.status_code != 206:
                out.truncate(0)  # a server that ignores the range sends all of it
                out.seek(0)
            pending = bytearray()
            try:
                async for chunk in answer.aiter_raw():
                    pending += chunk
                    if len(pending) >= CHUNK_BYTES:
                        piece, pending = pending, bytearray()
                        await asyncio.to_thread(out.write, piece)
                        progress(out.tell())
            finally:
                out.write(pending)  # what came before a break is kept
        if out.tell() < file.size:
            raise Interrupted(f"{self.endpoint} ended {file.path} after {out.tell()} bytes")

    def _url(self, repo: str, path: str) -> str:
        return f"{self.endpoint}/{quote(repo)}/resolve/main/{quote(path)}"

    @asynccontextmanager
    async def _get(
        self, url: str, repo: str, headers: dict[str, str] | None = None
    ) -> AsyncIterator[httpx.Response]:
        plain = {"Accept-Encoding": "identity", **(headers or {})}
        try:
            async with self._http.stream("GET", url, headers=plain) as answer:
                if not answer.is_success:
                    raise self._refusal(answer, repo)
                yield answer
        except httpx.HTTPError as error:
            why = str(error) or type(error).__name__
            raise Interrupted(
                f"cannot reach the Hugging Face Hub at {self.endpoint}: {why}; without a network, "
                "deploy a file with local_path"
            ) from error

    def _refusal(self, answer: httpx.Response, repo: str) -> GPUStackError:
        reason = answer.headers.get("x-error-code", "")
        hint = "the one given does not open it" if self._has_token else "none is set"
        token = f"start gpustack with --huggingface-token or HF_TOKEN ({hint})"
        if reason == "GatedRepo":
            return Forbidden(f"{repo} is gated: accept its terms on the Hub, then {token}")
        if reason == "EntryNotFound":
            return NotFound(f"{repo} has no such file any more")
        if reason == "RepoNotFound" or answer.status_code in {401, 404}:
            # The Hub does not tell strangers a private repository from none.
            return NotFound(f"there is no repository {repo}; if it is private, {token}")
        if answer.status_code == 403:
            return Forbidden(f"the Hub refuses {repo}: {token}")
        sentence = f"the Hub answered {answer.status_code} for {repo}"
        if answer.status_code == 429 or answer.status_code >= 500:
            return Interrupted(sentence)
        return Unavailable(sentence)


def _entries(answer: httpx.Response) -> list[dict[str, Any]]:
    try:
        entries = answer.json()
    except ValueError:
        entries = None
    if not isinstance(entries, list):
        raise Unavailable(f"{answer.url.host} does not speak the Hugging Face Hub's interface")
    return entries


def _file(entry: dict[str, Any]) -> RemoteFile:
    large = entry.get("lfs") or {}
    return RemoteFile(str(entry["path"]), int(entry["size"]), large.get("oid"))
