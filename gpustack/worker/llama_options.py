"""The options of the built-in engine: llama-server's names, as a table.

Imports nothing of gpustack, and so little else that an engine starts at once.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class Choice:
    """One of an enumeration's words, as llama-server spells them ("deepseek-legacy")."""

    def __init__(self, enumeration: str, prefix: str, *words: str, **also: str) -> None:
        self.enumeration, self.prefix = enumeration, prefix
        self.words = {word: word for word in words} | also

    def __call__(self, text: str) -> str:
        if text not in self.words:
            raise argparse.ArgumentTypeError(f"want one of {', '.join(self.words)}, got {text!r}")
        return self.words[text]

    def value(self, x: Any, word: str) -> Any:
        return getattr(x, self.enumeration)[self.prefix + word.upper().replace("-", "_")]


def _layers(text: str) -> int:
    """A number of layers; llama.cpp's own numbers for "auto" and "all"."""
    return {"auto": -1, "all": -2}.get(text) or int(text)


ON, OFF = True, False
Kind = Callable[[str], Any] | bool

_CACHE_TYPES = Choice(
    "ggml_type", "GGML_TYPE_",
    "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1",
)  # fmt: skip
_PRIORITY = Choice(
    "ggml_sched_priority", "GGML_SCHED_PRIO_",
    **{"-1": "low", "0": "normal", "1": "medium", "2": "high", "3": "realtime"},
)  # fmt: skip
_SWITCH = {"true": "enabled", "on": "enabled", "1": "enabled",
           "false": "disabled", "off": "disabled", "0": "disabled", "auto": "auto"}  # fmt: skip

#: Spellings -> attribute of xllamacpp.CommonParams, and how its value is read. ON and OFF take no
#: value. Source of the spellings: llama.cpp's common/arg.cpp.
OPTIONS: tuple[tuple[str, str, Kind], ...] = (
    ("--host", "host", str),
    ("--port", "port", int),
    ("--threads -t", "cpuparams.n_threads", int),
    ("--threads-batch -tb", "cpuparams_batch.n_threads", int),
    ("--threads-http", "n_threads_http", int),
    ("--prio", "cpuparams.priority", _PRIORITY),
    ("--prio-batch", "cpuparams_batch.priority", _PRIORITY),
    ("--poll", "cpuparams.poll", int),
    ("--poll-batch", "cpuparams_batch.poll", int),
    ("--numa", "numa", Choice("ggml_numa_strategy", "GGML_NUMA_STRATEGY_",
                              "distribute", "isolate", "numactl")),
    # context and batches
    ("--ctx-size -c", "n_ctx", int),
    ("--parallel -np", "n_parallel", int),
    ("--predict --n-predict -n", "n_predict", int),
    ("--batch-size -b", "n_batch", int),
    ("--ubatch-size -ub", "n_ubatch", int),
    ("--keep", "n_keep", int),
    ("--cont-batching -cb", "cont_batching", ON),
    ("--no-cont-batching -nocb", "cont_batching", OFF),
    ("--context-shift", "ctx_shift", ON),
    ("--no-context-shift", "ctx_shift", OFF),
    ("--swa-full", "swa_full", ON),
    ("--ctx-checkpoints -ctxcp --swa-checkpoints", "n_ctx_checkpoints", int),
    ("--checkpoint-min-step -cms", "checkpoint_min_step", int),
    # attention and its cache
    ("--flash-attn -fa", "flash_attn_type",
     Choice("llama_flash_attn_type", "LLAMA_FLASH_ATTN_TYPE_", **_SWITCH)),
    ("--cache-type-k -ctk", "cache_type_k", _CACHE_TYPES),
    ("--cache-type-v -ctv", "cache_type_v", _CACHE_TYPES),
    ("--kv-offload -kvo", "no_kv_offload", OFF),
    ("--no-kv-offload -nkvo", "no_kv_offload", ON),
    ("--kv-unified -kvu", "kv_unified", ON),
    ("--no-kv-unified -no-kvu", "kv_unified", OFF),
    ("--kv-unified-per-slot", "kv_unified_per_slot", int),
    ("--cache-prompt", "cache_prompt", ON),
    ("--no-cache-prompt", "cache_prompt", OFF),
    ("--cache-reuse", "n_cache_reuse", int),
    ("--cache-ram -cram", "cache_ram_mib", int),
    ("--cache-idle-slots", "cache_idle_slots", ON),
    ("--no-cache-idle-slots", "cache_idle_slots", OFF),
    ("--slot-prompt-similarity -sps", "slot_prompt_similarity", float),
    ("--slot-save-path", "slot_save_path", str),
    # where the weights lie
    ("--gpu-layers --n-gpu-layers -ngl", "n_gpu_layers", _layers),
    ("--split-mode -sm", "split_mode", Choice("llama_split_mode", "LLAMA_SPLIT_MODE_",
                                              "none", "layer", "row", "tensor")),
    ("--main-gpu -mg", "main_gpu", int),
    ("--override-tensor -ot", "tensor_buft_overrides", str),
    ("--op-offload", "no_op_offload", OFF),
    ("--no-op-offload", "no_op_offload", ON),
    ("--no-host", "no_host", ON),
    ("--repack", "no_extra_bufts", OFF),
    ("--no-repack -nr", "no_extra_bufts", ON),
    ("--load-mode -lm", "load_mode", Choice("llama_load_mode", "LLAMA_LOAD_MODE_", "auto", "none",
                                            "mmap", "mlock", "direct-io", "mmap-mlock")),
    ("--check-tensors", "check_tensors", ON),
    # position encoding
    ("--rope-scaling", "rope_scaling_type", Choice("llama_rope_scaling_type",
                                                   "LLAMA_ROPE_SCALING_TYPE_",
                                                   "none", "linear", "yarn", "longrope")),
    ("--rope-freq-base", "rope_freq_base", float),
    ("--rope-freq-scale", "rope_freq_scale", float),
    ("--yarn-orig-ctx", "yarn_orig_ctx", int),
    ("--yarn-ext-factor", "yarn_ext_factor", float),
    ("--yarn-attn-factor", "yarn_attn_factor", float),
    ("--yarn-beta-slow", "yarn_beta_slow", float),
    ("--yarn-beta-fast", "yarn_beta_fast", float),
    # sampling, where a request does not say
    ("--samplers", "sampling.samplers", str),
    ("--seed -s", "sampling.seed", int),
    ("--temp --temperature", "sampling.temp", float),
    ("--top-k", "sampling.top_k", int),
    ("--top-p", "sampling.top_p", float),
    ("--min-p", "sampling.min_p", float),
    ("--typical --typical-p", "sampling.typ_p", float),
    ("--xtc-probability", "sampling.xtc_probability", float),
    ("--xtc-threshold", "sampling.xtc_threshold", float),
    ("--repeat-last-n", "sampling.penalty_last_n", int),
    ("--repeat-penalty", "sampling.penalty_repeat", float),
    ("--presence-penalty", "sampling.penalty_present", float),
    ("--frequency-penalty", "sampling.penalty_freq", float),
    ("--dry-multiplier", "sampling.dry_multiplier", float),
    ("--dry-base", "sampling.dry_base", float),
    ("--dry-allowed-length", "sampling.dry_allowed_length", int),
    ("--dry-penalty-last-n", "sampling.dry_penalty_last_n", int),
    ("--dynatemp-range", "sampling.dynatemp_range", float),
    ("--dynatemp-exp", "sampling.dynatemp_exponent", float),
    ("--mirostat", "sampling.mirostat", int),
    ("--mirostat-lr", "sampling.mirostat_eta", float),
    ("--mirostat-ent", "sampling.mirostat_tau", float),
    ("--ignore-eos", "sampling.ignore_eos", ON),
    ("--special -sp", "special", ON),
    # chat
    ("--jinja", "use_jinja", ON),
    ("--no-jinja", "use_jinja", OFF),
    ("--chat-template", "chat_template", str),
    ("--chat-template-file", "chat_template_file", str),
    ("--prefill-assistant", "prefill_assistant", ON),
    ("--no-prefill-assistant", "prefill_assistant", OFF),
    ("--reasoning-format", "reasoning_format",
     Choice("common_reasoning_format", "COMMON_REASONING_FORMAT_",
            "none", "auto", "deepseek", "deepseek-legacy")),
    ("--reasoning-budget", "sampling.reasoning_budget_tokens", int),
    ("--reasoning-budget-message", "sampling.reasoning_budget_message", str),
    # embeddings and rerank
    ("--embedding --embeddings", "embedding", ON),
    ("--rerank --reranking", "rerank", ON),
    ("--pooling", "pooling_type", Choice("llama_pooling_type", "LLAMA_POOLING_TYPE_",
                                         "none", "mean", "cls", "last", "rank")),
    ("--embd-normalize", "embd_normalize", int),
    # images
    ("--mmproj -mm", "mmproj.path", str),
    ("--mmproj-offload", "mmproj_use_gpu", ON),
    ("--no-mmproj-offload", "mmproj_use_gpu", OFF),
    ("--image-min-tokens", "image_min_tokens", int),
    ("--image-max-tokens", "image_max_tokens", int),
    # a second, smaller model that guesses ahead
    ("--model-draft -md --spec-draft-model", "speculative.draft.mparams.path", str),
    ("--draft-max --draft --draft-n --spec-draft-n-max", "speculative.draft.n_max", int),
    ("--draft-min --draft-n-min --spec-draft-n-min", "speculative.draft.n_min", int),
    ("--draft-p-min --spec-draft-p-min", "speculative.draft.p_min", float),
    ("--gpu-layers-draft -ngld --spec-draft-ngl", "speculative.draft.n_gpu_layers", _layers),
    # the server
    ("--metrics", "endpoint_metrics", ON),
    ("--slots", "endpoint_slots", ON),
    ("--no-slots", "endpoint_slots", OFF),
    ("--props", "endpoint_props", ON),
    ("--ui --webui", "ui", ON),
    ("--no-ui --no-webui", "ui", OFF),
    ("--sse-ping-interval", "sse_ping_interval", int),
    ("--sleep-idle-seconds", "sleep_idle_seconds", int),
    ("--warmup", "warmup", ON),
    ("--no-warmup", "warmup", OFF),
    ("--perf", "no_perf", OFF),
    ("--no-perf", "no_perf", ON),
    ("--verbosity -lv --log-verbosity", "verbosity", int),
)  # fmt: skip


class Refused(Exception):
    """The options cannot be used; the message says which and why."""


class _Parser(argparse.ArgumentParser):
    def spellings(self) -> list[str]:
        """Every name of every option."""
        return [name for action in self._actions for name in action.option_strings]

    def error(self, message: str) -> NoReturn:
        raise Refused(message)


def _metavar(kind: Kind) -> str:
    if isinstance(kind, Choice):
        return "|".join(kind.words)
    return "TEXT" if kind is str else "X" if kind is float else "N"


def build() -> _Parser:
    parser = _Parser(
        prog="gpustack.worker.llama_server", allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for spellings, attribute, kind in OPTIONS:
        names = spellings.split()
        if isinstance(kind, bool):
            parser.add_argument(*names, dest=attribute, action="store_const", const=kind)
        elif attribute == "flash_attn_type":  # once it took no value
            parser.add_argument(
                *names, dest=attribute, type=kind, nargs="?", const="on", metavar="WORD"
            )
        else:
            parser.add_argument(*names, dest=attribute, type=kind, metavar=_metavar(kind))
    add: Callable[..., Any] = parser.add_argument
    add("--model", "-m", dest="model", required=True, metavar="FILE")
    add("--alias", "-a", dest="alias", metavar="NAME")
    add("--api-key-file", dest="api_key_file", metavar="FILE")
    add("--tensor-split", "-ts", dest="tensor_split", metavar="X,X")
    add("--rope-scale", dest="rope_scale", type=float, metavar="X")
    add("--timeout", "-to", dest="timeout", type=int, metavar="SECONDS")
    add("--fit", "-fit", dest="fit", choices=("on", "off"))
    add("--reasoning", "-rea", dest="reasoning", choices=("on", "off", "auto"))
    add("--mmap", dest="mmap", action="store_true")
    add("--no-mmap", dest="mmap", action="store_false")
    add("--mlock", dest="mlock", action="store_true")
    add("--lora", dest="lora", action="append", metavar="FILE")
    add("--lora-scaled", dest="lora_scaled", action="append", nargs=2, metavar=("FILE", "X"))
    return parser


def parsed(argv: Sequence[str]) -> dict[str, Any]:
    """What `argv` gives, by destination.

    Raises:
        Refused: an option is unknown, or its value is wrong.
    """
    parser = build()
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        name = next((word for word in unknown if word.startswith("-")), unknown[0])
        name = name.partition("=")[0]
        import difflib  # only here: 4 ms

        near = difflib.get_close_matches(name, parser.spellings(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise Refused(f"the built-in engine does not know {name}{hint}")
    return vars(given)
