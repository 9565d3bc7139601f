"""`make demo`: start a node, deploy a model, stream one answer, and leave the node running.

Environment:
    MODEL: a GGUF file, or org/repo[:file] on the Hugging Face Hub; a tiny random one without.
    DEMO_EXIT: 1 stops the node after the answer.
    DEMO_PROMPT, DEMO_DIR: what is asked; where the node keeps its state (./.demo).
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

from demo import tiny_gguf
from gpustack.cli.connection import connection
from gpustack.cli.models import creation
from gpustack.cli.waiting import until_running
from gpustack.cli.words import give_up, line, reason
from gpustack.client import Client
from gpustack.errors import Conflict, NotFound
from gpustack.lib.net import can_bind
from gpustack.lib.text import plain
from gpustack.schemas.credentials import ApiKeyCreate
from gpustack.schemas.models import Model, ModelCreate

NAME = "demo"
PROMPT = "Say hello to the world."
MAX_TOKENS = 64
ENGINE_PORTS = 64
#: Tried in this order; below the ports that the kernel hands out to whoever connects.
FIRST_PORTS = range(18480, 32000, 100)
START_LIMIT_S, STOP_LIMIT_S = 120, 60
#: What ends the demo: Ctrl-C, `kill`, a closed terminal. The last not on Windows.
ENDINGS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class NodeFailed(Exception):
    """The node ended, or never became ready."""


@dataclass(frozen=True)
class Ports:
    """The node's three ports, and those of its engines."""

    first: int

    @property
    def public(self) -> int:
        return self.first

    @property
    def engines(self) -> range:
        return range(self.first + 20, self.first + 20 + ENGINE_PORTS)

    def options(self) -> list[str]:
        return [
            "--port", str(self.public),
            "--api-port", str(self.first + 1),
            "--worker-port", str(self.first + 2),
            "--disable-metrics", "--disable-worker-metrics",
            "--service-port-range", f"{self.engines[0]}-{self.engines[-1]}",
        ]  # fmt: skip


def say(words: str = "", *, end: str = "\n") -> None:
    """Print, if somebody still reads: the node matters more than what is said about it."""
    try:
        sys.stdout.write(plain(words) + end)
        sys.stdout.flush()
    except OSError:
        give_up(sys.stdout)


def complain(words: str) -> None:
    try:
        sys.stderr.write(f"demo: {line(words)}\n")
    except OSError:
        give_up(sys.stderr)


def free_ports() -> Ports:
    """Ports that nobody listens on."""
    for first in FIRST_PORTS:
        ports = Ports(first)
        wanted = (first, first + 1, first + 2, *ports.engines)
        if all(can_bind("0.0.0.0", port) for port in wanted):
            return ports
    raise NodeFailed("no free block of ports below 32000")


def start(folder: Path, ports: Ports) -> subprocess.Popen[bytes]:
    """The node as a child, in a process group of its own: Ctrl-C reaches this program alone."""
    command = [
        sys.executable, "-m", "gpustack", "start", "--data-dir", str(folder), *ports.options(),
        "--system-reserved", '{"ram": 0.2, "vram": 0}',
    ]  # fmt: skip
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("GPUSTACK_")}
    with (folder / "node.log").open("wb") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=inherited,
            start_new_session=True,
        )  # fmt: skip


def last_words(folder: Path) -> str:
    lines = (folder / "node.log").read_text(errors="replace").splitlines()
    return lines[-1] if lines else "it said nothing"


async def until_ready(url: str, node: subprocess.Popen[bytes], folder: Path) -> None:
    """Return once the node's gateway answers and a worker can take models."""
    deadline = time.monotonic() + START_LIMIT_S
    async with httpx.AsyncClient(base_url=url, timeout=5, trust_env=False) as http:
        while True:
            if node.poll() is not None:
                raise NodeFailed(f"the node ended: {last_words(folder)}")
            try:
                if (await http.get("/readyz")).is_success:
                    return
            except httpx.TransportError:
                pass
            if time.monotonic() > deadline:
                raise NodeFailed(f"the node is not ready after {START_LIMIT_S} s")
            await asyncio.sleep(0.05)


def chosen(folder: Path, wanted: str) -> ModelCreate:
    """The model that MODEL names, or a tiny one of our own making."""
    made = creation(NAME, wanted or str(tiny_gguf.write(folder / "tiny-random.gguf")))
    if made.local_path and not Path(made.local_path).exists():
        raise NotFound(f"MODEL: there is no file {made.local_path}")
    if made.huggingface_repo_id and not made.huggingface_filename:
        made.huggingface_filename = "*.gguf"  # the only one of the repository
    return made


async def deploy(client: Client, made: ModelCreate) -> Model:
    """The model, running. One that an earlier demo left is replaced."""
    while True:
        try:
            model = await client.models.create(made)
            break
        except Conflict:
            old = await client.models.by_name(NAME)
            if not old.deleting:
                await client.models.delete(old.id)
            await asyncio.sleep(0.1)  # its name is free once its engines are gone
    await until_running(client, model, lambda words: say(f"  {words}"))
    return model


async def stream(url: str, key: str) -> None:
    """Print one answer as it comes, and how fast it came."""
    prompt = os.environ.get("DEMO_PROMPT", PROMPT)
    say(f"\n> {prompt}\n")
    http = openai.DefaultAsyncHttpxClient(trust_env=False)  # no proxy leads to this machine
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, http_client=http) as client:
        began = time.perf_counter()
        first: float | None = None
        tokens = 0
        answer = await client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=MAX_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for event in answer:
            piece = event.choices[0].delta.content if event.choices else None
            if piece:
                first = first or time.perf_counter()
                say(piece, end="")
            if event.usage:
                tokens = event.usage.completion_tokens
    ended = time.perf_counter()
    first = first or ended
    rate = (tokens - 1) / (ended - first) if tokens > 1 and ended > first else 0.0
    say(
        f"\n\ntime to first token: {1000 * (first - began):.0f} ms"
        f"\ntokens per second:   {rate:.0f} ({tokens} tokens)",
    )


async def show(url: str, folder: Path, node: subprocess.Popen[bytes], made: ModelCreate) -> None:
    began = time.perf_counter()
    await until_ready(url, node, folder)
    say(f"node ready after {time.perf_counter() - began:.1f} s at {url}")
    say(f"deploying {made.location}")
    async with connection(url, None, folder).client() as client:
        began = time.perf_counter()
        await deploy(client, made)
        say(f"model running after {time.perf_counter() - began:.1f} s")
        key = await client.api_keys.create(ApiKeyCreate(name=f"demo {time.time():.0f}"))
    await stream(url, key.value)
    say(
        f"\nURL:            {url}/v1 (OpenAI clients), model {NAME}"
        f"\nAPI key:        {key.value}"
        f"\nadmin password: {password_place(folder)}"
        f"\nlog:            {folder / 'node.log'}",
    )


def password_place(folder: Path) -> str:
    place = folder / "initial_admin_password"
    return f"in {place}" if place.exists() else "changed since the first start"


async def until_interrupted(node: subprocess.Popen[bytes], folder: Path) -> None:
    say("\nThe node runs until Ctrl-C.")
    while node.poll() is None:  # noqa: ASYNC110  another process's end
        await asyncio.sleep(0.2)
    raise NodeFailed(f"the node ended: {last_words(folder)}")


async def run(folder: Path, ports: Ports, node: subprocess.Popen[bytes], made: ModelCreate) -> None:
    await show(f"http://127.0.0.1:{ports.public}", folder, node, made)
    if os.environ.get("DEMO_EXIT") != "1":
        await until_interrupted(node, folder)


def stop(node: subprocess.Popen[bytes]) -> None:
    """Return once the node is gone, its engines too."""
    for number in ENDINGS:
        signal.signal(number, signal.SIG_IGN)  # a second one must not leave it half stopped
    if node.poll() is None:
        node.send_signal(signal.SIGTERM)  # first of all: whatever follows may fail
        say("stopping the node")
        try:
            node.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            node.kill()
            node.wait()


@contextmanager
def undisturbed() -> Iterator[None]:
    """What would end us ends us afterwards: a node that was started must be known to `main`."""
    came: list[int] = []

    def remember(number: int, _frame: Any) -> None:
        came.append(number)

    before = {number: signal.signal(number, remember) for number in heard()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def heard() -> list[signal.Signals]:
    """The signals that end us; `nohup` and a shell's `&` have us ignore some."""
    return [number for number in ENDINGS if signal.getsignal(number) is not signal.SIG_IGN]


def main() -> int:
    folder = Path(os.environ.get("DEMO_DIR", ".demo")).absolute()
    for number in heard():
        signal.signal(number, signal.default_int_handler)
    node: subprocess.Popen[bytes] | None = None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = chosen(folder, os.environ.get("MODEL", ""))
        ports = free_ports()
        with undisturbed():
            node = start(folder, ports)
        asyncio.run(run(folder, ports, node, made))
    except KeyboardInterrupt:
        say()
    except (NodeFailed, openai.OpenAIError) as error:
        complain(str(error))
        return 1
    except Exception as error:
        if (words := reason(error)) is None:
            raise
        complain(words)
        return 1
    finally:
        if node is not None:
            stop(node)
    return 0


if __name__ == "__main__":
    sys.exit(main())
