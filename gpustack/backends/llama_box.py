"""llama-box, llama.cpp's llama-server, or the built-in llama.cpp: all take llama-server's options.

Without an installed binary the engine is the `xllamacpp` package, run by
`gpustack.worker.llama_server`, which reads the same options.
"""

from collections.abc import Iterator

from gpustack.backends.base import Demand, Launch, Limits, ProbeRequest, Slot
from gpustack.backends.parameters import find, flat, names, whole_number
from gpustack.lib.units import MIB, gib
from gpustack.schemas.models import Category, VersionSpec
from gpustack.schemas.profiles import Profile

#: Tokens of context when nobody says otherwise, all parallel requests together. Source: GPUStack's
#: documented default for llama-box, `--ctx-size 8192 --parallel 4`.
CONTEXT_TOKENS = 8192
PARALLEL = 4

#: Process, tokenizer and code. Source: 32 MB resident measured with a 1 MB model.
PROCESS_BYTES = 48 * MIB
#: Tokens that llama.cpp evaluates at once (`--ubatch-size`); sizes its compute buffers.
UBATCH_TOKENS = 512

BUSY_GAUGES = ("llamacpp:requests_processing", "llamacpp:requests_deferred")
#: The first moves with each batch; the others only at a prompt's end, and with each token after.
#: Measured: through a prompt of 120,000 tokens the first moved every 2,048 tokens (`--batch-size`),
#: the second not once; /metrics answered in 2 ms all the time.
PROGRESS_COUNTERS = (
    "llamacpp:n_decode_total",
    "llamacpp:prompt_tokens_total",
    "llamacpp:tokens_predicted_total",
    # Of llama-box itself. Source: the table of /metrics in its README.
    "llamabox:tokens_prefill_total",
    "llamabox:tokens_decode_total",
    "llamabox:image_forward_total",
    "llamabox:image_reverse_total",
)

#: It reads its whole file before it answers: 180 GB over a gigabit of network take half an hour.
START_S = 1800.0
#: One batch of 2,048 tokens may take this long on a CPU: 1.1 tokens/s, slower than a model of 70
#: billion parameters at 4 bit on two cores. GPUs are a hundred times faster.
#: Told not to warm up, it maps its file and reads it only in the first request.
CPU_LIMITS = Limits(start_s=START_S, first_s=START_S, stuck_s=1800.0)
GPU_LIMITS = Limits(start_s=START_S, stuck_s=600.0)

#: Options that name the engine's place in the cluster; a user's value would break the routing.
OWNED = {
    "--host", "--port", "--api-key", "--api-key-file", "--alias", "-a", "--model", "-m",
    "--path", "--ssl-key-file", "--ssl-cert-file", "--api-prefix", "--log-file",
}  # fmt: skip


class LlamaBox:
    name = "llama-box"
    programs: tuple[str, ...] = ("llama-box", "llama-server")

    def runs(self, spec: VersionSpec) -> bool:
        # Without a file: repositories of GGUF files are called so on the Hub.
        file = spec.local_path or spec.huggingface_filename or spec.huggingface_repo_id or ""
        return file.lower().endswith((".gguf", "-gguf"))

    def problem(self, spec: VersionSpec) -> str | None:
        for name in names(spec.backend_parameters):
            if name in OWNED:
                return f"backend parameter {name} is set by gpustack and cannot be given"
        for option in ("--ctx-size", "-c", "--parallel", "-np"):
            value = find(spec.backend_parameters, option)
            if value is not None and whole_number(value) is None:
                wanted = "want a whole number of at most nine digits"
                return f"backend parameter {option}: {wanted}, got {value[:40]!r}"
        return None

    def demands(self, spec: VersionSpec, profile: Profile) -> Iterator[Demand]:
        context = context_tokens(spec, profile)
        parts = [(f"weights, {profile.source or 'size on disk'}", profile.weights_bytes)]
        if profile.layers and profile.kv_heads:
            cache = kv_cache_bytes(
                layers=profile.layers,
                kv_heads=profile.kv_heads,
                head_dim=profile.head_dim,
                tokens=context,
            )
            parts.append((f"keys and values of {context} tokens at 16 bit", cache))
        parts.append(("compute buffers", compute_bytes(profile)))
        parts.append(("process", PROCESS_BYTES))
        yield Demand(
            devices=0,
            vram_bytes=0,
            ram_bytes=sum(size for _, size in parts),
            explanation=tuple(f"{gib(size)}: {what}" for what, size in parts),
        )

    def launch(self, spec: VersionSpec, slot: Slot) -> Launch:
        program = next((p for n in self.programs if (p := slot.executables.get(n))), None)
        command = [program] if program else [slot.python, "-m", "gpustack.worker.llama_server"]
        given = set(names(spec.backend_parameters))
        argv = [*command, "--model", slot.model_path]
        if not given & {"--ctx-size", "-c"}:
            argv += ["--ctx-size", str(CONTEXT_TOKENS)]
        if not given & {"--parallel", "-np"}:
            argv += ["--parallel", str(PARALLEL)]
        if Category.EMBEDDING in spec.categories and "--embeddings" not in given:
            argv.append("--embeddings")
        if Category.RERANKER in spec.categories and not given & {"--reranking", "--rerank"}:
            argv.append("--reranking")
        # Ours come last: the parser keeps the final value, so a user cannot move the engine off
        # the address that the gateway dials.
        argv += [
            *flat(spec.backend_parameters),
            "--metrics",
            "--host", "127.0.0.1",
            "--port", str(slot.port),
            "--alias", slot.served_name,
            "--api-key-file", slot.secret_file,
        ]  # fmt: skip
        return Launch(
            tuple(argv),
            env={"GGML_NO_BACKTRACE": "1", **spec.env},
            busy_gauges=BUSY_GAUGES,
            progress_counters=PROGRESS_COUNTERS,
            probe=probe(spec, slot.served_name),
            limits=GPU_LIMITS if slot.devices else CPU_LIMITS,
        )


def probe(spec: VersionSpec, served_name: str) -> ProbeRequest:
    """The smallest request of what the engine was started for.

    Completions for all that generates: chat needs a template, which base models lack. An engine
    that ranks answers completions with 500, one without `--embeddings` embeddings with 501.
    """
    given = set(names(spec.backend_parameters))
    if Category.RERANKER in spec.categories or given & {"--reranking", "--rerank"}:
        return ProbeRequest("/v1/rerank", {"model": served_name, "query": "1", "documents": ["1"]})
    if Category.EMBEDDING in spec.categories or given & {"--embeddings", "--embedding"}:
        return ProbeRequest("/v1/embeddings", {"model": served_name, "input": "1"})
    return ProbeRequest("/v1/completions", {"model": served_name, "prompt": "1", "max_tokens": 1})


def context_tokens(spec: VersionSpec, profile: Profile) -> int:
    """Tokens that the engine keeps keys and values for."""
    for option in ("--ctx-size", "-c"):
        number = whole_number(find(spec.backend_parameters, option) or "")
        if number is not None:
            # llama.cpp reads 0 as "what the model was trained for".
            return number or profile.max_context or CONTEXT_TOKENS
    return CONTEXT_TOKENS


def kv_cache_bytes(
    *, layers: int, kv_heads: int, head_dim: int, tokens: int, dtype_bytes: int = 2
) -> int:
    """Memory that the keys and values of `tokens` tokens occupy, bytes.

    Shapes: two tensors (K and V) of [layers, kv_heads, tokens, head_dim].

    Args:
        kv_heads: heads that store keys and values (fewer than attention heads under GQA).
        dtype_bytes: 2 for fp16, llama.cpp's default.

    Source: follows from the shapes. Check: 32 layers, 8 heads, 128 dims, 8192 tokens, fp16
    is 1 GiB exactly.
    """
    return 2 * layers * kv_heads * head_dim * tokens * dtype_bytes


def compute_bytes(profile: Profile) -> int:
    """llama.cpp's compute buffers: the activations of one micro-batch, fp32.

    Source: the largest are the logits of the outputs [ubatch, vocabulary] and a few tensors of
    [ubatch, embedding]; counted as the logits and eight of the latter.
    """
    return 4 * UBATCH_TOKENS * (profile.vocabulary + 8 * profile.embedding_length)
