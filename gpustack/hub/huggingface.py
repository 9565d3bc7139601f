"""The Hugging Face Hub's HTTP interface, as far as models need it: list, read, download.

Not `huggingface_hub`: since version 2 its downloads begin anew after every interruption, and a
download in a thread cannot be cancelled. See docs/decisions.
"""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO, Self
from urllib.parse import quote

import httpx

from gpustack.errors import Forbidden, GPUStackError, Invalid, NotFound, Unavailable
from gpustack.hub.proxies import ProxiedTransport
from gpustack.lib.net import without_credentials
from gpustack.lib.secrets import Secret
from gpustack.lib.text import plain

ENDPOINT = "https://huggingface.co"
#: Attempts in a row that bring no byte, before a download is given up.
ATTEMPTS = 5
CHUNK_BYTES = 1 << 20
#: Far above any repository in use: a page lists 1000 files in some 400 KB.
MAX_PAGES, MAX_LISTING_BYTES = 100, 64 << 20


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

    Attributes:
        endpoint: its address as it may be shown.

    Raises:
        Invalid: the endpoint is no address, no header can hold the token, or a proxy is none.
    """

    def __init__(
        self, token: Secret | None, *, endpoint: str | None = None, pause_s: float = 1.0
    ) -> None:
        address = endpoint or os.environ.get("HF_ENDPOINT") or ENDPOINT
        self._address = address.rstrip("/")
        self.endpoint = without_credentials(self._address)
        self._origin = _origin(self._address)
        self._has_token = token is not None
        if token is not None and not re.fullmatch(r"[!-~]+", token.reveal()):
            raise Invalid(
                "the Hugging Face token has characters that no token has (spaces, line ends, "
                "letters beyond ASCII): see --huggingface-token or HF_TOKEN"
            )
        self._pause_s = pause_s
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {token.reveal()}"} if token else {},
            timeout=httpx.Timeout(30, connect=10),
            follow_redirects=True,  # to another host: without the token
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

    async def files(self, repo: str) -> list[RemoteFile]:
        """Every file of the repository's main branch.

        Raises:
            NotFound: no such repository.
            Forbidden: it is gated or private, and the token does not open it.
            Unavailable: the Hub does not answer, or with what is no list of files.
        """
        found: list[RemoteFile] = []
        url = f"{self._address}/api/models/{quote(repo)}/tree/main?recursive=true"
        left = MAX_LISTING_BYTES
        for _ in range(MAX_PAGES):
            async with self._get(url, repo) as answer:
                content = await self._page(answer, left, repo)
                left -= len(content)
                found += self._files(content)
                following = answer.links.get("next", {}).get("url")
            if following is None:
                return found
            url = self._at_home(url, following)
        raise Unavailable(f"{self.endpoint} lists the files of {repo} on over {MAX_PAGES} pages")

    async def _page(self, answer: httpx.Response, limit: int, repo: str) -> bytes:
        content = bytearray()
        async for chunk in answer.aiter_bytes(CHUNK_BYTES):
            content += chunk
            if len(content) > limit:
                raise Unavailable(
                    f"{self.endpoint} lists the files of {repo} in over {MAX_LISTING_BYTES} bytes"
                )
        return bytes(content)

    def _files(self, content: bytes) -> list[RemoteFile]:
        try:
            entries = json.loads(content)
            files = [_file(entry) for entry in entries] if isinstance(entries, list) else None
        except (ValueError, RecursionError):
            files = None
        if files is None:
            raise Unavailable(f"{self.endpoint} does not speak the Hugging Face Hub's interface")
        return [file for file in files if file is not None]

    def _at_home(self, url: str, following: str) -> str:
        """The next page's address: the token is shown to no other host."""
        try:
            target = str(httpx.URL(url).join(following))
            if _origin(target) == self._origin:
                return target
        except (Invalid, ValueError, httpx.InvalidURL):
            pass  # no address at all
        raise Unavailable(
            f"{self.endpoint} continues its list of files at another address: "
            f"{plain(without_credentials(following))[:200]}"
        )

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
            Unavailable: the Hub gave nothing `ATTEMPTS` times in a row, or more than there is;
                then `out` is empty.
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
                    if out.tell() + len(pending) > file.size:
                        pending.clear()
                        out.truncate(0)  # what came before is not to be trusted either
                        raise Unavailable(
                            f"the Hub sends more for {file.path} than the {file.size} bytes that "
                            "it announced"
                        )
                    if len(pending) >= CHUNK_BYTES:
                        piece, pending = pending, bytearray()
                        await asyncio.to_thread(out.write, piece)
                        progress(out.tell())
            finally:
                out.write(pending)  # what came before a break is kept
        if out.tell() < file.size:
            raise Interrupted(f"{self.endpoint} ended {file.path} after {out.tell()} bytes")

    def _url(self, repo: str, path: str) -> str:
        return f"{self._address}/{quote(repo)}/resolve/main/{quote(path)}"

    @asynccontextmanager
    async def _get(
        self, url: str, repo: str, headers: dict[str, str] | None = None
    ) -> AsyncIterator[httpx.Response]:
        sent = {"Accept-Encoding": "identity", **(headers or {})}
        try:
            async with self._http.stream("GET", url, headers=sent) as answer:
                if not answer.is_success:
                    raise self._refusal(answer, repo)
                yield answer
        except (httpx.InvalidURL, UnicodeError) as error:  # a host's name, or a redirection's
            raise Unavailable(f"no request can be sent to {self.endpoint}: {error}") from error
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


def _file(entry: object) -> RemoteFile | None:
    """One entry of a list; None: it is a folder.

    Raises:
        ValueError: it is nothing that a Hub lists.
    """
    if not isinstance(entry, dict):
        raise ValueError
    if entry.get("type") != "file":
        return None
    path, size, large = entry.get("path"), entry.get("size"), entry.get("lfs")
    if not isinstance(path, str) or type(size) is not int or not 0 <= size < 2**63:
        raise ValueError
    path.encode()  # half a surrogate pair is no name: UnicodeEncodeError, a ValueError
    if large is None:
        return RemoteFile(path, size, None)
    digest = large.get("oid") if isinstance(large, dict) else None
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError
    return RemoteFile(path, size, digest)


def _origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port.

    Raises:
        Invalid: it is no address of a server.
    """
    try:
        read = httpx.URL(url)  # read as it is by the requests that are sent to it
        port = read.port or {"http": 80, "https": 443}[read.scheme]
        if read.host and port < 2**16:
            return read.scheme, read.host, port
    except (httpx.InvalidURL, ValueError, KeyError):
        pass  # no address at all
    shown = plain(without_credentials(url))[:200]
    raise Invalid(f"{shown!r} is no address of a Hugging Face Hub: see HF_ENDPOINT")
