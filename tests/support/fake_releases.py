"""What github.com is to tools: releases with their checksums, on loopback."""

import hashlib
import io
import ssl
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from gpustack.hub.llama_box import RELEASES, SUMS
from tests.support.certificate import Issued


@dataclass
class FakeReleases:
    """What there is, and how the server behaves.

    Attributes:
        files: <version>/<name> -> content; checksums come by themselves.
        sums: the checksum file instead.
        cuts: bytes after which each next file is cut; then they go through.
        moved: <version>/<name> -> where it is redirected to.
        asked: path and Range header of every request.
        credentials: the Authorization header of every request.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    sums: bytes | None = None
    cuts: list[int] = field(default_factory=list)
    ignore_ranges: bool = False
    moved: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    credentials: list[str | None] = field(default_factory=list)

    def content(self, path: str) -> bytes | None:
        version, _, name = path.partition("/")
        if name != SUMS:
            return self.files.get(path)
        if self.sums is not None:
            return self.sums
        lines = [
            f"{hashlib.sha256(content).hexdigest()}  {path.partition('/')[2]}\n"
            for path, content in self.files.items()
            if path.startswith(f"{version}/")
        ]
        return "".join(lines).encode() or None


class _Handler(BaseHTTPRequestHandler):
    releases: FakeReleases
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client that gave up
            super().handle()

    def do_GET(self) -> None:
        releases, asked = self.releases, self.headers["Range"]
        path = self.path.removeprefix(f"/{RELEASES}/")
        releases.asked.append((path, asked))
        releases.credentials.append(self.headers["Authorization"])
        if path in releases.moved:
            self._answer(302, b"", {"Location": releases.moved[path]})
            return
        content = releases.content(path)
        if content is None:
            self._answer(404, b"none")
            return
        status = 200
        if asked and not releases.ignore_ranges:
            content, status = content[int(asked.removeprefix("bytes=").rstrip("-")) :], 206
        cut = releases.cuts.pop(0) if releases.cuts and not path.endswith(SUMS) else len(content)
        self._answer(status, content, cut=cut)

    def _answer(
        self, status: int, body: bytes, more: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {**(more or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        if cut is not None and cut < len(body):
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def fake_releases(certificate: Issued | None = None) -> Iterator[FakeReleases]:
    """Releases; with a certificate over HTTPS, as localhost."""
    releases = FakeReleases()
    handler = type("Handler", (_Handler,), {"releases": releases})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    releases.url = f"http://127.0.0.1:{server.server_port}"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.certfile, certificate.keyfile)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        releases.url = f"https://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield releases
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def zipped(files: dict[str, str | bytes], *, links: tuple[str, ...] = ()) -> bytes:
    """A zip of `files`; those in `links` are symbolic links to their content."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (0o120777 if name in links else 0o100644) << 16
            made.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return out.getvalue()
