"""A Hugging Face Hub on loopback: listing, files, ranges, gates, and connections that break."""

import hashlib
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.certificate import Issued

PAGE = 2


@dataclass
class FakeHub:
    """What the Hub has, and how it behaves.

    Attributes:
        repos: repository -> path -> content.
        gated: repositories that only `token` opens.
        cuts: bytes after which each next download is cut; then downloads go through.
        corrupt: send other bytes than announced.
        excess: sent after the end of each file.
        listing: every page, instead of what there is.
        following: where every page says that the next one is.
        tokens: the Authorization header of every request.
        ranges: the Range header of every download.
    """

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str = "hf_right"
    cuts: list[int] = field(default_factory=list)
    corrupt: bool = False
    excess: bytes = b""
    listing: bytes | None = None
    following: str = ""
    tokens: list[str | None] = field(default_factory=list)
    ignore_ranges: bool = False
    broken: bool = False
    ranges: list[str | None] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    sent_bytes: int = 0


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append(self.path)
        hub.tokens.append(self.headers["Authorization"])
        listing = path.startswith("/api/models/")
        repo = path.removeprefix("/api/models") if listing else path
        name = "/".join(repo.split("/")[1:3])
        if hub.broken:
            self._fail(503, "")
        elif name not in hub.repos:
            self._fail(401, "RepoNotFound")
        elif name in hub.gated and self.headers["Authorization"] != f"Bearer {hub.token}":
            self._fail(403, "GatedRepo")
        elif listing:
            self._list(name)
        else:
            self._file(name, path.split("/resolve/main/")[1])

    def _list(self, name: str) -> None:
        start = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        files = sorted(self.hub.repos[name].items())
        entries: list[dict[str, Any]] = [{"type": "directory", "path": "sub", "oid": "x"}]
        for path, content in files[start : start + PAGE]:
            digest = hashlib.sha256(content).hexdigest()
            large = {"oid": digest, "size": len(content), "pointerSize": 134}
            entry = {"type": "file", "path": path, "size": len(content), "oid": "git"}
            entries.append(entry | ({"lfs": large} if path.endswith(".gguf") else {}))
        more = {}
        if start + PAGE < len(files):
            following = f"{self.hub.url}/api/models/{name}/tree/main?cursor={start + PAGE}"
            more["Link"] = f'<{following}>; rel="next"'
        if self.hub.following:
            more["Link"] = f'<{self.hub.following}>; rel="next"'
        listing = self.hub.listing
        self._answer(200, json.dumps(entries).encode() if listing is None else listing, more)

    def _file(self, name: str, path: str) -> None:
        hub = self.hub
        if path not in hub.repos[name]:
            self._fail(404, "EntryNotFound")
            return
        content = hub.repos[name][path]
        content += hub.excess
        if hub.corrupt:
            content = bytes(byte ^ 1 for byte in content)
        asked = self.headers["Range"]
        hub.ranges.append(asked)
        status, body, more = 200, content, {}
        if asked and not hub.ignore_ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            end = min(int(last or len(content)), len(content) - 1)
            status, body = 206, content[int(first) : end + 1]
            more["Content-Range"] = f"bytes {first}-{end}/{len(content)}"
        cut = hub.cuts.pop(0) if hub.cuts else len(body)
        self._answer(status, body, more, cut)

    def _fail(self, status: int, code: str) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code})

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        self.hub.sent_bytes += len(body[:cut])
        if cut is not None and cut < len(body):
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def fake_hub(certificate: Issued | None = None) -> Iterator[FakeHub]:
    """A Hub; with a certificate it speaks HTTPS, as localhost."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.certfile, certificate.keyfile)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        hub.url = f"https://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
