"""`gpustack chat` against servers that answer badly."""

import json
import os
import pty
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.conftest import environment

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def event(content: str) -> bytes:
    said = {"choices": [{"delta": {"content": content}}]}
    return b"data: " + json.dumps(said).encode() + b"\n\n"


@contextmanager
def server(answer: bytes, *, reset: bool = False) -> Iterator[str]:
    """A server that sends `answer` to one request and closes; with `reset` rudely."""

    def serve() -> None:
        peer, _ = listener.accept()
        with peer:
            asked = b""
            while not asked.endswith(b"}"):
                asked += peer.recv(65536)
            peer.sendall(answer)
            if reset:
                read.wait(20)
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    read = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        thread = threading.Thread(target=serve)
        thread.start()
        threading.Timer(1, read.set).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(20)


def command(url: str) -> list[str]:
    return [sys.executable, "-m", "gpustack", "chat", "m", "hi", "--server-url", url]


@pytest.mark.parametrize(
    ("answer", "reset"),
    [
        (STREAM + b"\r\n" + event("one") + b'data: {"cho', False),
        (STREAM + b"\r\n" + event("one"), False),
        (STREAM + b"Content-Length: 999\r\n\r\n" + event("one"), True),
        (STREAM + b"\r\ndata: 5\n\n", False),
        (STREAM[:9], True),
    ],
)
def test_an_answer_that_breaks_off_is_one_sentence(
    answer: bytes, reset: bool, tmp_path: Path
) -> None:
    with server(answer, reset=reset) as url:
        done = subprocess.run(
            command(url), env=environment(tmp_path), capture_output=True, text=True, timeout=30,
            check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ("one" if b"one" in answer else "")


def test_a_model_gives_no_orders_to_the_terminal(tmp_path: Path) -> None:
    words = event("a\x1b[2J\x1b]0;title\x07b\tc\n") + event("d\x9b2J") + b"data: [DONE]\n\n"
    ours, theirs = pty.openpty()
    with server(STREAM + b"\r\n" + words) as url:
        done = subprocess.run(
            command(url), env=environment(tmp_path), stdout=theirs, stderr=subprocess.PIPE,
            timeout=30, check=False,
        )  # fmt: skip
    os.close(theirs)
    shown = os.read(ours, 4096)
    os.close(ours)
    assert done.stderr == b""
    assert shown == b"ab\tc\r\nd\r\n"
