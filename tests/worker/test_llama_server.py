"""The built-in engine: real processes, real models, llama.cpp's own server."""

import asyncio
import json
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
import pytest

from demo import tiny_gguf
from gpustack.worker import llama_server
from gpustack.worker.llama_options import OPTIONS, Refused, build, parsed
from tests.support.ports import free_ports

KEY = "only-the-gateway-knows"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    kinds: tuple[tiny_gguf.Kind, ...] = ("chat", "embed", "rerank")
    found: dict[str, Path] = {"broken": tiny_gguf.write_broken(folder / "broken.gguf")}
    for kind in kinds:
        found[kind] = tiny_gguf.write(folder / f"{kind}.gguf", kind)
    return found


@dataclass
class Engine:
    process: subprocess.Popen[bytes]
    client: httpx.Client
    log: Path


def argv(model: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "gpustack.worker.llama_server", "--model", str(model), *options]


@contextmanager
def engine(folder: Path, model: Path, *options: str) -> Iterator[Engine]:
    """A running engine that is ready. Killed at the end if it still runs."""
    port = free_ports(1)
    keys = folder / "key"
    keys.write_text(f"{KEY}\n")
    log = folder / "engine.log"
    more = ["--port", str(port), "--api-key-file", str(keys), "--alias", "tiny", "-t", "1"]
    with log.open("ab") as file:
        process = subprocess.Popen(
            argv(model, *more, *options), stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    bearer = {"Authorization": f"Bearer {KEY}"}
    # The engine closes idle connections when it likes; a new one each time cannot meet that.
    limits = httpx.Limits(max_keepalive_connections=0)
    url = f"http://127.0.0.1:{port}"
    with process, httpx.Client(base_url=url, headers=bearer, timeout=30, limits=limits) as client:
        try:
            _until_ready(client, process, log)
            yield Engine(process, client, log)
        finally:
            process.kill()


def _until_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 20
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.005)


def chat(prompt: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 24, **more}


def test_a_chat_model_answers_chat_completions_and_metrics(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    with engine(tmp_path, models["chat"], "--metrics", "--parallel", "2", "-c", "2048") as running:
        client = running.client
        answer = client.post("/v1/chat/completions", json=chat("hello")).json()
        text = answer["choices"][0]["message"]["content"]
        assert set(text.split()) <= set(tiny_gguf.WORDS)
        assert answer["usage"]["completion_tokens"] == 24
        assert answer["model"] == "tiny"
        streamed = client.post(
            "/v1/chat/completions",
            json=chat("hello", stream=True, stream_options={"include_usage": True}),
        )
        events = [json.loads(line[6:]) for line in streamed.text.split("\n\n") if "{" in line]
        assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events[:-1]) == text
        assert events[-1]["usage"]["completion_tokens"] == 24
        assert streamed.text.endswith("data: [DONE]\n\n")
        completed = client.post("/v1/completions", json={"prompt": "the", "max_tokens": 3}).json()
        assert completed["choices"][0]["text"]
        assert "llamacpp:prompt_tokens_total" in client.get("/metrics").text
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]


def test_a_request_without_the_key_is_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    with engine(tmp_path, models["chat"]) as running:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            bare = httpx.Client(base_url=running.client.base_url, headers=headers)
            with bare:
                assert bare.post("/v1/chat/completions", json=chat("hi")).status_code == 401
                assert bare.get("/health").status_code == 200
        command = Path(f"/proc/{running.process.pid}/cmdline")
        if command.exists():
            assert KEY.encode() not in command.read_bytes()


@pytest.mark.parametrize("kind", ["embed", "chat"])  # the chat model names no pooling
def test_embeddings_are_one_unit_vector_per_text(
    kind: str, tmp_path: Path, models: dict[str, Path]
) -> None:
    with engine(tmp_path, models[kind], "--embeddings") as running:
        body = {"model": "tiny", "input": ["hello world", "water"]}
        answer = running.client.post("/v1/embeddings", json=body).json()
        vectors = [item["embedding"] for item in answer["data"]]
        assert len(vectors) == 2
        for vector in vectors:
            assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-4)
        assert vectors[0] != vectors[1]


def test_a_reranker_scores_every_document(tmp_path: Path, models: dict[str, Path]) -> None:
    with engine(tmp_path, models["rerank"], "--reranking") as running:
        body = {"query": "water", "documents": ["oil", "water", "people"]}
        answer = running.client.post("/v1/rerank", json=body).json()
        assert sorted(item["index"] for item in answer["results"]) == [0, 1, 2]
        assert len({item["relevance_score"] for item in answer["results"]}) == 3


async def test_200_streams_at_once_each_get_the_text_that_they_get_alone(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    options = ("--ctx-size", "8192", "--parallel", "4", "--flash-attn", "off")
    with engine(tmp_path, models["chat"], *options) as running:
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=running.client.base_url,
            headers=running.client.headers,
            limits=limits,
            timeout=60,
        ) as client:

            async def text(prompt: str) -> str:
                body = chat(prompt, stream=True)
                found, ids, done = "", set(), False
                async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                    async for line in answer.aiter_lines():
                        if line.startswith("data: {"):
                            event = json.loads(line[6:])
                            ids.add(event["id"])
                            found += event["choices"][0]["delta"].get("content") or ""
                        done = done or line == "data: [DONE]"
                assert done
                assert len(ids) == 1
                return found

            words = tiny_gguf.WORDS
            prompts = [f"{words[n % 97]} {words[n % 31]} {n}" for n in range(200)]
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(text(prompt)) for prompt in prompts]
            together = [task.result() for task in tasks]
            assert len(set(together)) > 100
            assert together == [await text(prompt) for prompt in prompts]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_cleanly_within_a_second_even_while_it_streams(
    number: signal.Signals, tmp_path: Path, models: dict[str, Path]
) -> None:
    with engine(tmp_path, models["chat"], "-c", "2048") as running:
        body = chat("hello", stream=True, max_tokens=1900)
        with running.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            next(answer.iter_lines())
            running.process.send_signal(number)
            assert running.process.wait(1) == 0


def outcome(tmp_path: Path, *command: str) -> tuple[int, str]:
    """Exit status, and the last line on stderr."""
    log = tmp_path / "engine.log"
    with log.open("ab") as file:
        status = subprocess.run(
            command, stdin=subprocess.DEVNULL, stderr=file, timeout=20, check=False
        ).returncode
    text = log.read_text()
    assert "Traceback" not in text
    return status, text.splitlines()[-1]


def test_a_broken_model_ends_with_llama_cpps_own_reason(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    (tmp_path / "engine.log").write_text("0.00.003.711 E an error of an earlier life\n")
    command = argv(models["broken"], "--port", str(free_ports(1)))
    status, sentence = outcome(tmp_path, *command)
    assert status == 1
    assert sentence.startswith(f"error: cannot serve {models['broken']}: ")
    assert "is not within the file bounds" in sentence


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "none.gguf"
    status, sentence = outcome(tmp_path, *argv(missing, "--port", str(free_ports(1))))
    assert status == 1
    assert "No such file or directory" in sentence
    assert str(missing) in sentence


def test_a_model_that_is_not_gguf_is_refused_wherever_stderr_goes(tmp_path: Path) -> None:
    model = tmp_path / "text.gguf"
    model.write_text("hello")
    done = subprocess.run(
        argv(model), stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False
    )
    assert done.returncode == 1
    assert done.stderr.decode().splitlines()[-1].endswith("says why in the lines above")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--temprature", "1"], "does not know --temprature; did you mean --temperature?"),
        (["--ctx=1"], "does not know --ctx"),
        (["stray"], "does not know stray"),
        (["--pooling", "most"], "--pooling: want one of none, mean, cls, last, rank, got 'most'"),
        (["--threads", "many"], "--threads/-t"),
        (["--api-key", "k"], "does not know --api-key; did you mean --api-key-file?"),
        (["--lora-scaled", "f", "big"], "--lora-scaled: want FILE and a number, got 'big'"),
        (["--tensor-split", "a,b"], "--tensor-split: want shares"),
    ],
)
def test_a_wrong_option_is_named_in_one_sentence(
    options: list[str], words: str, tmp_path: Path
) -> None:
    status, sentence = outcome(tmp_path, *argv(tmp_path / "m.gguf", *options))
    assert status == 2
    assert words in sentence


def test_a_key_file_without_a_key_never_opens_the_engine(tmp_path: Path) -> None:
    keys = tmp_path / "key"
    keys.write_text("\n")
    command = argv(tmp_path / "m.gguf", "--api-key-file", str(keys))
    status, sentence = outcome(tmp_path, *command)
    assert status == 2
    assert "has no key in it" in sentence


def test_every_option_of_the_table_reaches_llama_cpp(tmp_path: Path) -> None:
    import xllamacpp

    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    for spellings, _, kind in OPTIONS:
        name = spellings.split()[0]
        words = [name]
        if not isinstance(kind, bool):
            options = getattr(kind, "words", {})
            words.append(next(iter(options), "1"))
        if name in {"--chat-template-file"}:
            words[1] = str(template)
        if name == "--override-tensor":
            words[1] = "blk=CPU"
        given = parsed(["--model", "m.gguf", *words])
        llama_server.apply(given, xllamacpp, xllamacpp.CommonParams())


def test_every_option_is_what_its_misspelling_may_mean() -> None:
    shown = {word.strip(",[]") for word in build().format_help().split() if word.startswith("--")}
    assert {"--model", "--lora-scaled", "--api-key-file", "--ctx-size"} <= shown
    assert shown <= set(build().spellings())
    with pytest.raises(Refused, match="did you mean --lora-scaled"):
        parsed(["--model", "m.gguf", "--lora-scald", "x"])


LATE_WORDS = """
import sys, threading, time
from gpustack.worker.llama_server import _last_words, _log_size

def late():
    for part in ("0.0.1 I load: loading\\n0.0.2 E load: out of", " bounds\\n0.0.3 E then\\n"):
        time.sleep(0.2)
        sys.stderr.write(part)
        sys.stderr.flush()

before = _log_size()
threading.Thread(target=late).start()
print(_last_words(before))
"""


def test_words_that_llama_cpp_writes_after_its_failure_are_waited_for(tmp_path: Path) -> None:
    with (tmp_path / "engine.log").open("wb") as log:
        command = [sys.executable, "-c", LATE_WORDS]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, check=True, timeout=30)
    assert done.stdout == b"load: out of bounds\n"


def test_weights_and_sampling_options_mean_what_llama_server_says() -> None:
    import xllamacpp as x

    def made(*words: str) -> Any:
        params = x.CommonParams()
        llama_server.apply(parsed(["-m", "m.gguf", *words]), x, params)
        return params

    assert made("--mlock").load_mode == x.llama_load_mode.LLAMA_LOAD_MODE_MMAP_MLOCK
    assert made("--mlock", "--no-mmap").load_mode == x.llama_load_mode.LLAMA_LOAD_MODE_MLOCK
    assert made("--no-mmap").load_mode == x.llama_load_mode.LLAMA_LOAD_MODE_NONE
    assert made("-ngl", "all").n_gpu_layers == -2
    assert made("-ngl", "7").n_gpu_layers == 7
    assert made("-fa").flash_attn_type == x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    assert made("--temp=0.25").sampling.temp == 0.25
    assert made("--rope-scale", "4").rope_freq_scale == 0.25
    assert made("--lora", "a", "--lora-scaled", "b", "0.5").lora_adapters[1].scale == 0.5
    assert made("--no-kv-offload").no_kv_offload is True
    assert list(made("-ts", "3,1").tensor_split[:2]) == [3.0, 1.0]


def test_the_engine_listens_soon(tmp_path: Path, models: dict[str, Path]) -> None:
    # 50 ms on an idle machine; the bound is what only a heavy import would break.
    began = time.monotonic()
    with engine(tmp_path, models["chat"]):
        assert time.monotonic() - began < 1.5


def test_nothing_heavy_is_imported_for_an_engine() -> None:
    code = "import gpustack.worker.llama_server, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=20
    ).stdout.split()
    ours = {name for name in loaded if name.startswith("gpustack.")}
    assert ours == {
        "gpustack.worker",
        "gpustack.worker.llama_options",
        "gpustack.worker.llama_server",
    }
    assert not {"pydantic", "asyncio", "httpx", "logging"} & set(loaded)
