"""llama-box: what it needs, and how it is started."""

from dataclasses import replace
from typing import Any

import pytest

from gpustack.backends import backend_for
from gpustack.backends.base import Slot
from gpustack.backends.llama_box import LlamaBox, kv_cache_bytes
from gpustack.lib.units import GIB
from gpustack.schemas.models import Source, VersionSpec
from gpustack.schemas.profiles import Profile

SLOT = Slot(model_path="/m.gguf", served_name="qwen", port=40001, secret_file="/run/key")


def spec(**more: Any) -> VersionSpec:
    return VersionSpec.model_validate({"source": "local_path", "local_path": "/m.gguf"} | more)


def test_keys_and_values_of_a_known_model_take_exactly_one_gib() -> None:
    assert kv_cache_bytes(layers=32, kv_heads=8, head_dim=128, tokens=8192) == GIB


def test_a_demand_explains_every_byte_it_asks_for() -> None:
    profile = Profile(
        weights_bytes=4 * GIB, layers=32, kv_heads=8, head_dim=128, vocabulary=32000,
        embedding_length=4096, max_context=32768,
    )  # fmt: skip
    (demand,) = LlamaBox().demands(spec(), profile)
    assert demand.ram_bytes > 5 * GIB
    assert [line.split(": ")[0] for line in demand.explanation[:2]] == ["4.0 GiB", "1.0 GiB"]


def test_a_larger_context_asks_for_more() -> None:
    profile = Profile(weights_bytes=GIB, layers=32, kv_heads=8, head_dim=128, max_context=16384)
    small, large, trained = (
        next(LlamaBox().demands(spec(backend_parameters=parameters), profile)).ram_bytes
        for parameters in (["--ctx-size=4096"], ["-c 8192"], ["--ctx-size", "0"])
    )
    assert large - small == GIB // 2
    assert trained - large == GIB


def test_the_engine_stays_where_the_gateway_dials_whatever_the_user_writes() -> None:
    argv = LlamaBox().launch(spec(backend_parameters=["--seed 1"]), SLOT).argv
    assert argv[-9:] == (
        "--metrics", "--host", "127.0.0.1", "--port", "40001", "--alias", "qwen",
        "--api-key-file", "/run/key",
    )  # fmt: skip
    assert argv[argv.index("--seed") + 1] == "1"


@pytest.mark.parametrize("parameter", ["--port=1", "--host 0.0.0.0", "--api-key", "-m /x", "-a b"])
def test_what_gpustack_sets_cannot_be_given(parameter: str) -> None:
    problem = LlamaBox().problem(spec(backend_parameters=[parameter]))
    assert problem is not None
    assert parameter.split("=")[0].split()[0] in problem


def test_an_installed_binary_is_preferred_to_the_built_in_engine() -> None:
    installed = Slot(
        model_path="/m.gguf", served_name="q", port=1, secret_file="/k", python="/py",
        executables={"llama-server": "/usr/bin/llama-server"},
    )  # fmt: skip
    assert LlamaBox().launch(spec(), installed).argv[0] == "/usr/bin/llama-server"
    built_in = LlamaBox().launch(spec(), SLOT).argv
    assert built_in[1:3] == ("-m", "gpustack.worker.llama_server")


def test_categories_turn_on_what_they_need() -> None:
    assert "--embeddings" in LlamaBox().launch(spec(categories=["embedding"]), SLOT).argv
    assert "--reranking" in LlamaBox().launch(spec(categories=["reranker"]), SLOT).argv


def test_a_gguf_file_is_for_llama_box_and_an_unknown_backend_for_nobody() -> None:
    found = backend_for(spec())
    assert found is not None
    assert found.name == "llama-box"
    assert backend_for(spec(local_path="/models/folder")) is None
    assert backend_for(spec(backend="nope")) is None


@pytest.mark.parametrize(
    ("repo", "file", "ours"),
    [("org/m-GGUF", None, True), ("org/m", "*Q4.gguf", True), ("org/m", None, False)],
)
def test_a_repository_is_for_llama_box_by_its_file_or_else_its_name(
    repo: str, file: str | None, ours: bool
) -> None:
    from_hub = VersionSpec(
        source=Source.HUGGING_FACE, huggingface_repo_id=repo, huggingface_filename=file
    )
    assert LlamaBox().runs(from_hub) is ours


@pytest.mark.parametrize(
    ("facts", "path", "asks"),
    [
        ({}, "/v1/completions", "prompt"),
        ({"categories": ["llm"]}, "/v1/completions", "prompt"),
        ({"categories": ["embedding"]}, "/v1/embeddings", "input"),
        ({"categories": ["llm", "reranker"]}, "/v1/rerank", "query"),
        ({"backend_parameters": ["--embeddings"]}, "/v1/embeddings", "input"),
        ({"backend_parameters": ["--reranking"]}, "/v1/rerank", "query"),
    ],
)
def test_the_probe_request_is_of_what_the_engine_was_started_for(
    facts: dict[str, Any], path: str, asks: str
) -> None:
    probe = LlamaBox().launch(spec(**facts), SLOT).probe
    assert probe is not None
    assert (probe.method, probe.path, probe.body["model"]) == ("POST", path, "qwen")
    assert asks in probe.body


def test_an_engine_on_a_cpu_may_be_silent_longer_than_one_on_a_gpu() -> None:
    on_cpu = LlamaBox().launch(spec(), SLOT).limits
    on_gpu = LlamaBox().launch(spec(), replace(SLOT, devices=(0,))).limits
    assert on_cpu.stuck_s > on_gpu.stuck_s
    assert on_cpu.first_s > on_gpu.first_s
