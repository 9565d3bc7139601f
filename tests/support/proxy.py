"""A proxy of HTTP (absolute addresses, CONNECT) and SOCKS 5 that writes down who is asked for."""

import contextlib
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from socketserver import StreamRequestHandler, ThreadingTCPServer


@dataclass
class RecordingProxy:
    """Where it listens, and what it was asked for.

    Attributes:
        at: host:port of the proxy itself.
        asked: the address of every connection, as the client named it.
        credentials: the Proxy-Authorization header of every HTTP request.
        routes: name -> port on loopback, for names that no resolver knows.
    """

    at: str = ""
    asked: list[str] = field(default_factory=list)
    credentials: list[str | None] = field(default_factory=list)
    routes: dict[str, int] = field(default_factory=dict)

    def connect(self, host: str, port: int) -> socket.socket:
        self.asked.append(f"{host}:{port}")
        return socket.create_connection(("127.0.0.1", self.routes.get(host, port)), timeout=30)


class _Handler(StreamRequestHandler):
    proxy: RecordingProxy
    timeout = 30

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            first = self.rfile.peek(1)[:1]  # type: ignore[attr-defined]
            if first == b"\x05":
                self._socks()
            elif first:
                self._http()

    def _socks(self) -> None:
        _, methods = self.rfile.read(2)
        self.rfile.read(methods)
        self.wfile.write(b"\x05\x00")
        _, _, _, kind = self.rfile.read(4)
        if kind == 3:
            host = self.rfile.read(self.rfile.read(1)[0]).decode()
        else:
            host = socket.inet_ntoa(self.rfile.read(4))
        port = int.from_bytes(self.rfile.read(2), "big")
        with self.proxy.connect(host, port) as target:
            self.wfile.write(b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00")
            self._pass(target)

    def _http(self) -> None:
        method, address, version = self.rfile.readline().decode().split()
        lines = []
        while (line := self.rfile.readline().decode()).strip():
            lines.append(line)
        fields = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        self.proxy.credentials.append(fields.get("proxy-authorization"))
        authority, _, path = address.removeprefix("http://").partition("/")
        host, _, port = authority.partition(":")
        with self.proxy.connect(host, int(port or 80)) as target:
            if method == "CONNECT":
                self.wfile.write(b"HTTP/1.1 200 Connected\r\n\r\n")
                self._pass(target)
                return
            # One request to a connection, and both sides are told: the next is for another host.
            kept = [x for x in lines if not x.lower().startswith(("proxy-", "connection:"))]
            head = [f"{method} /{path} {version}\r\n", *kept, "Connection: close\r\n\r\n"]
            target.sendall("".join(head).encode())
            with target.makefile("rb") as answer:
                while (field := answer.readline()).strip():
                    self.wfile.write(field)
                self.wfile.write(b"Connection: close\r\n\r\n")
                shutil.copyfileobj(answer, self.wfile)

    def _pass(self, target: socket.socket) -> None:
        def up() -> None:
            with contextlib.suppress(OSError):
                while data := self.rfile.read1(65536):
                    target.sendall(data)
                target.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=up, daemon=True)
        thread.start()
        while data := target.recv(65536):
            self.wfile.write(data)
        self.connection.shutdown(socket.SHUT_RDWR)
        thread.join()


@contextlib.contextmanager
def recording_proxy() -> Iterator[RecordingProxy]:
    proxy = RecordingProxy()
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    server = ThreadingTCPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    proxy.at = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
