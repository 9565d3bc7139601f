"""What engines said when they failed, recorded, and what a user is told of it."""

import re

import pytest

from gpustack.worker.supervisor.diagnosis import SIGNS, explain

VLLM = "https://github.com/vllm-project/vllm/issues/"
LLAMA = "https://github.com/ggml-org/llama.cpp/issues/"
GPUSTACK = "https://github.com/gpustack/gpustack/issues/"

#: Where it was reported; the lines; what the sentence has in it.
RECORDED = [
    # --- llama.cpp and llama-box
    (
        LLAMA + "20431",
        "load_tensors: loading model tensors, this can take a while... (mmap = true)\n"
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 144817.04 MiB on device 0: "
        "cudaMalloc failed: out of memory\n"
        "alloc_tensor_range: failed to allocate CUDA0 buffer of size 151851674624\n"
        "llama_model_load: error loading model: unable to allocate CUDA0 buffer",
        "its device ran out of memory; lower the context length",
    ),
    (
        "https://github.com/ollama/ollama/issues/6860",
        "ggml_gallocr_reserve_n: failed to allocate CUDA4 buffer of size 150995968\n"
        "llama_new_context_with_model: failed to allocate compute buffers",
        "its device ran out of memory",
    ),
    (LLAMA + "13085", "CUDA error: out of memory\n  current device: 2", "its device ran out of"),
    (
        LLAMA + "8101",
        "llama_new_context_with_model: n_ctx      = 1048576\n"
        "ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 1374389\n"
        "llama_kv_cache_init: failed to allocate buffer for kv cache",
        "the worker's memory does not suffice",
    ),
    (
        LLAMA + "15139",
        "ggml_aligned_malloc: insufficient memory (attempted to allocate 17592186044416.00 MB)\n"
        "libc++abi: terminating due to uncaught exception of type std::bad_alloc: std::bad_alloc",
        "the worker's memory does not suffice",
    ),
    (
        "https://github.com/ollama/ollama/issues/6228",
        "llama_model_load: error loading model: tensor 'blk.2.ffn_down.weight' data is not within "
        "the file bounds, model is corrupted or incomplete",
        "the model's file is broken",
    ),
    (
        "https://github.com/abetlen/llama-cpp-python/issues/755",
        "gguf_init_from_file: invalid magic number 73726576\n"
        "error loading model: llama_model_loader: failed to load model from /models/a.gguf",
        "the model's file is broken, or is none of this engine's",
    ),
    (
        "https://github.com/ollama/ollama/issues/602",
        "server: error while loading shared libraries: libcudart.so.12: cannot open shared object "
        "file: No such file or directory",
        "the library libcudart.so.12 is missing",
    ),
    (
        GPUSTACK + "1101",
        "/root/.local/share/pipx/venvs/gpustack/lib/python3.10/site-packages/gpustack/third_party/"
        "bin/llama-box/llama-box: error while loading shared libraries: libascend_dump.so: cannot "
        "open shared object file: No such file or directory",
        "the library libascend_dump.so is missing; install what has it",
    ),
    (
        "https://github.com/ollama/ollama/issues/7666",
        "ggml_cuda_init: failed to initialize CUDA: CUDA driver version is insufficient for CUDA "
        "runtime version",
        "the GPU's driver does not go with the engine's CUDA",
    ),
    (
        LLAMA + "17542",
        "ggml_cuda_init: failed to initialize CUDA: system has unsupported display driver / cuda "
        "driver combination",
        "the GPU's driver does not go with the engine's CUDA",
    ),
    (
        "https://github.com/abetlen/llama-cpp-python/issues/880",
        "CUDA error 100 at ggml-cuda.cu:5823: no CUDA-capable device is detected\n"
        "current device: 0",
        "it found no GPU; look whether the driver works",
    ),
    (
        "https://github.com/ollama/ollama/issues/10421",
        "ggml_cuda_init: failed to initialize ROCm: no ROCm-capable device is detected",
        "it found no GPU",
    ),
    (
        GPUSTACK + "1382",
        "4.00.239.807 E CUDA error: no kernel image is available for execution on the device\n"
        "4.00.239.816 E   current device: 0, in function ggml_cuda_compute_forward",
        "the engine was not built for this kind of GPU",
    ),
    (
        GPUSTACK + "3741",
        "load_backend: loaded CPU backend from /app/libggml-cpu-haswell.so\n"
        "error: invalid argument: --ctx-size=16384",
        "it does not know the argument --ctx-size; correct the model's backend parameters",
    ),
    (
        GPUSTACK + "2319",
        "Invalid argument: --override-tensor\nAvailable buffer types:\n  CPU\n  CUDA0\n  CUDA1",
        "it does not know the argument --override-tensor",
    ),
    (
        GPUSTACK + "2644",  # it goes on after this: what came later is what ended it
        "Unknown argument: --origin-rpc-server-main-gpu\n"
        "[2025-07-29 11:29:24.564529] I version    : v0.0.164 (af2727c)\n"
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 35533.34 MiB on device 0: "
        "cudaMalloc failed: out of memory",
        "its device ran out of memory",
    ),
    # --- vLLM
    (
        VLLM + "25837",
        "(EngineCore_DP0 pid=17374) ERROR 09-28 15:47:24 [core.py:718] ValueError: Free memory on "
        "device (3.22/4.0 GiB) on startup is less than desired GPU memory utilization (0.9, 3.6 "
        "GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.\n"
        "RuntimeError: Engine core initialization failed. See root cause above.",
        "others hold memory of its GPU; end them, or lower --gpu-memory-utilization",
    ),
    (
        "https://github.com/wyf3/llm_related/issues/29",
        "ValueError: No available memory for the cache blocks. Try increasing "
        "`gpu_memory_utilization` when initializing the engine.",
        "its context does not fit into the GPU memory that the weights leave",
    ),
    (
        VLLM + "2418",
        "ValueError: The model's max seq len (4096) is larger than the maximum number of tokens "
        "that can be stored in KV cache (3664). Try increasing `gpu_memory_utilization` or "
        "decreasing `max_model_len` when initializing the engine.",
        "lower --max-model-len",
    ),
    (
        VLLM + "1157",
        "ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0. "
        "Your Tesla T4 GPU has compute capability 7.5.",
        "add the backend parameter --dtype=half",
    ),
    (VLLM + "14413", "RuntimeError: No CUDA GPUs are available", "it found no GPU"),
    (VLLM + "12847", "RuntimeError: Failed to infer device type", "it found no GPU"),
    (
        VLLM + "31018",
        "ImportError: libcudart.so.12: cannot open shared object file: No such file or directory",
        "the library libcudart.so.12 is missing",
    ),
    (
        "https://github.com/xorbitsai/inference/issues/2865",
        "OSError: libcuda.so.1: cannot open shared object file: No such file or directory",
        "libcuda.so.1 is missing, which comes with the device's driver",
    ),
    (
        VLLM + "39609",
        "ImportError: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.34' not found",
        "this system lacks GLIBC_2.34",
    ),
    (
        VLLM + "22072",
        "usage: vllm serve [model_tag] [options]\n"
        "vllm serve: error: unrecognized arguments: --dtype-auto serve HuggingFaceTB/SmolLM3-3B",
        "it does not know the argument --dtype-auto",
    ),
    (
        "https://github.com/vllm-project/vllm/pull/14200",
        "ValueError: Model architectures ['BaichuanForCausalLM'] are not supported for now.",
        "does not know the architecture BaichuanForCausalLM",
    ),
    # --- Ascend: MindIE, vLLM and SGLang
    (
        GPUSTACK + "4761",
        "RuntimeError: NPU out of memory. Tried to allocate 98.71 GiB (NPU 0; 60.96 GiB total "
        "capacity; 25.03 GiB already allocated)",
        "its device ran out of memory",
    ),
    (
        GPUSTACK + "3541",
        "[llm] [ERROR] [logging.py-348] : Warmup failed, because of multimodal model inference out "
        "of memory when `maxInputTokenLen` set to 8192. Please try to decrease `maxPrefillTokens`",
        "its device ran out of memory",
    ),
    (
        GPUSTACK + "1909",
        "[ERROR] RUNTIME(29167,mindie_llm_backend_connector):2025-04-27-07:23:17.709.136 "
        "rtMalloc:[INIT][DEFAULT]ErrCode=207001, desc=[driver error:out of memory]",
        "its device ran out of memory",
    ),
    (
        GPUSTACK + "3225",
        "[ERROR] 2025-11-10-16:26:28 (PID:42, Device:0) ERR00100 PTA call acl api failed\n"
        "[Error]: Invalid device ID.",
        "it cannot see the device",
    ),
    (
        "https://github.com/vllm-project/vllm-ascend/issues/152",
        "ImportError: libatb.so: cannot open shared object file: No such file or directory",
        "the library libatb.so is missing",
    ),
    (
        "https://github.com/vllm-project/vllm-ascend/issues/1144",
        "ImportError: /opt/mindie_turbo/_ops.so: undefined symbol: "
        "_ZNK6AsdOps3Ops18GetOperationByNameERKSs",
        "libraries are of versions that do not go together",
    ),
    # --- the built-in engine, made here
    (
        "made with it",
        "error: the built-in engine does not know --ctx-sise; did you mean --ctx-size?",
        "it does not know the argument --ctx-sise;",
    ),
    (
        "made with it",
        "error: argument --threads/-t: invalid int value: 'many'",
        "it does not take the value of --threads;",
    ),
    (
        "made with it",
        "error: cannot serve /m.gguf: llama_model_load: error loading model: unknown model "
        "architecture: 'lamma'",
        "does not know the architecture lamma; use a newer one",
    ),
    (
        "made with it: a model that ranks, asked for a completion",
        "/health answers, but the first request (POST /v1/completions) got 500: the current "
        "context does not support logits computation. skipping",
        "give it the category reranker or embedding",
    ),
]


@pytest.mark.parametrize(("source", "log", "says"), RECORDED)
def test_recorded_ends_of_logs_are_understood(source: str, log: str, says: str) -> None:
    assert says in (explain(f"some line before\n{log}\nand one after") or "")


@pytest.mark.parametrize(
    "log",
    [
        "",
        "Traceback (most recent call last):\nKeyError: 'x'",
        # vllm-ascend 3316: a warning that every such start has
        "WARNING 10-09 01:30:00 [_custom_ops.py:20] Failed to import from vllm._C with "
        "ImportError('libcudart.so.12: cannot open shared object file: No such file or directory')",
        # a prompt that was logged
        "prompt: 'why is my GPU out of memory? It says error: something'",
    ],
)
def test_what_is_not_known_is_not_guessed(log: str) -> None:
    assert explain(log, code=1) is None


def test_every_meaning_is_one_line_that_quotes_no_more_than_a_name() -> None:
    for pattern, meaning in SIGNS:
        assert "\n" not in meaning
        assert meaning.count("{}") <= 1
        assert "." not in meaning.removesuffix(".").split("; ")[0].replace("/dev/shm", "")
        assert pattern.flags & re.MULTILINE
    secret = "sk-secret-word-of-a-user"
    said = explain(f"error: unrecognized arguments: --api-key {secret}\nerror: {secret}")
    assert said is not None
    assert secret not in said


@pytest.mark.parametrize(
    ("code", "oom_killed", "says"),
    [
        (-9, True, "the kernel ended a process because memory ran out"),
        (1, True, "the kernel ended a process because memory ran out"),  # a child of it was
        (-9, None, "perhaps the kernel did so because memory ran out"),
        (137, None, "perhaps the kernel did so because memory ran out"),
        (-9, False, None),
        (-4, False, "this CPU lacks instructions"),
        (132, False, "this CPU lacks instructions"),
        (-7, False, "became shorter or cannot be read"),
        (-11, False, None),
        (0, False, None),
        (1, None, None),
        (200, None, None),
        (None, None, None),
    ],
)
def test_signals_speak_where_the_log_does_not(
    code: int | None, oom_killed: bool | None, says: str | None
) -> None:
    said = explain("nothing that is known", code=code, oom_killed=oom_killed)
    assert (said is None) if says is None else (says in (said or ""))


def test_what_the_log_says_of_itself_counts_before_what_the_kernel_did_to_somebody() -> None:
    """Where a control group is not the engine's own, the kernel counts the whole machine's."""
    text = "error: invalid argument: --ctx-siz"
    said = explain(text, code=1, oom_killed=True)
    assert said is not None
    assert said.startswith("it does not know the argument --ctx-siz")
    killed = explain(text, code=-9, oom_killed=True)
    assert killed is not None
    assert killed.startswith("the kernel ended a process")
