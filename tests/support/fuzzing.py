"""Requests that nobody would think of: schemathesis against an API on a port of this machine."""

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from gpustack.server.app import ApiServer
from tests.support.ports import free_ports

#: Answers as the document has them; what it does not allow is refused; what is deleted is gone.
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_headers_conformance", "response_schema_conformance", "negative_data_rejection",
    "ignored_auth", "use_after_free", "ensure_resource_availability",
)  # fmt: skip


@asynccontextmanager
async def listening(app: FastAPI) -> AsyncIterator[str]:
    """`app` answers at this URL until the context ends."""
    # Named TCP, or asyncio leaves Nagle's algorithm on: 40 ms more for each answer.
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", free_ports(1)))
    sock.listen()
    server = ApiServer(app)
    async with asyncio.TaskGroup() as group:
        group.create_task(server.serve(sockets=[sock]))
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True


def finite(document: dict[str, Any]) -> dict[str, Any]:
    """The same without what asks for an answer that never ends."""
    document = json.loads(json.dumps(document))
    del document["paths"]["/v2/watch"]
    for methods in document["paths"].values():
        for said in methods.values():
            asked = said.get("parameters", [])
            said["parameters"] = [one for one in asked if one["name"] not in {"watch", "follow"}]
    return document


async def fuzzed(
    document: dict[str, Any],
    url: str,
    folder: Path,
    *options: str,
    credential: str | None,
    settings: str = "",
) -> tuple[int, str]:
    """The exit code and the words of schemathesis. 0: it found nothing wrong with what is at `url`.

    Args:
        folder: to work in.
        options: of `schemathesis run`.
        settings: its configuration file.
    """
    (folder / "openapi.json").write_text(json.dumps(finite(document)))
    (folder / "schemathesis.toml").write_text(settings)
    shown = [f"--header=Authorization:Bearer {credential}"] if credential else []
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", f"--url={url}",
        f"--checks={','.join(CHECKS)}", "--no-color", "--continue-on-failure", *shown, *options,
        cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, said.decode()
