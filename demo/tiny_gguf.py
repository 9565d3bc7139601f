"""Tiny random-weights models as GGUF files: real files for a real engine, and no download.

    python -m demo.tiny_gguf OUT.gguf --kind chat|embed|rerank [--seed 0]

They answer with English words in no sensible order. The same seed gives the same file.
"""

import argparse
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import gguf
import numpy as np
from numpy.typing import NDArray

Kind = Literal["chat", "embed", "rerank"]
Array = NDArray[np.float32]

LAYERS, WIDTH, HEADS, KV_HEADS, INNER = 2, 64, 4, 2, 128
HEAD_WIDTH = WIDTH // HEADS

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
WORDS = (
    "the a of to and in is you that it he was for on are as with his they I at be this have from "
    "or one had by word but not what all were we when your can said there use an each which she do "
    "how their if will up other about out many then them these so some her would make like him "
    "into time has look two more write go see number no way could people my than first water been "
    "call who oil its now find long down day did get come made may part hello world user assistant "
    "system model token server cluster"
).split()
SPACE = "\u2581"  # how SentencePiece writes the space before a word


class Token(NamedTuple):
    text: str
    score: float
    type: gguf.TokenType


def vocabulary() -> list[Token]:
    """A SentencePiece vocabulary: every byte, every ASCII character, and `WORDS`."""
    kinds = gguf.TokenType
    tokens = [Token("<unk>", 0, kinds.UNKNOWN)]
    tokens += [Token(text, 0, kinds.CONTROL) for text in ("<s>", "</s>")]
    tokens += [Token(f"<0x{byte:02X}>", 0, kinds.BYTE) for byte in range(256)]
    characters = [SPACE, *(chr(code) for code in range(33, 127))]
    tokens += [Token(c, -1000.0 - n, kinds.NORMAL) for n, c in enumerate(characters)]
    # Merging goes by pairs, so each word needs all its beginnings; longer ones score higher.
    pieces = {f"{SPACE}{word}"[:end] for word in WORDS for end in range(2, len(word) + 2)}
    ranked = sorted(pieces, key=lambda piece: (-len(piece), piece))
    tokens += [Token(piece, -1.0 - n, kinds.NORMAL) for n, piece in enumerate(ranked)]
    roles = ("system", "user", "assistant", "tool")
    tokens += [Token(f"<|{role}|>", 0, kinds.USER_DEFINED) for role in roles]
    while len(tokens) % 32:
        tokens.append(Token(f"<pad{len(tokens)}>", 0, kinds.UNUSED))
    return tokens


def write(
    path: Path, kind: Kind = "chat", *, seed: int = 0, context: int = 2048, layers: int = LAYERS
) -> Path:
    """Write a model of `kind` to `path` (below 1.1 MB) and return `path`.

    Args:
        context: tokens it says it was trained for.
        layers: more make it larger and slower; 150 answer about 100 tokens/s on one core.
    """
    tokens = vocabulary()
    # llama.cpp loads a classifier head for encoders only, so the reranker is a BERT.
    writer = gguf.GGUFWriter(path, "bert" if kind == "rerank" else "llama")
    _write_facts(writer, kind, tokens, context, layers)
    source = np.random.default_rng(seed)
    if kind == "rerank":
        _write_encoder(writer, source, len(tokens), context, layers)
    else:
        _write_decoder(writer, source, tokens, layers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_broken(path: Path, kind: Kind = "chat") -> Path:
    """Write a model whose file ends in the middle of its weights: its header is whole."""
    write(path, kind)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size * 2 // 3)
    return path


def _write_facts(
    writer: gguf.GGUFWriter, kind: Kind, tokens: list[Token], context: int, layers: int
) -> None:
    writer.add_name(f"tiny-random-{kind}")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(context)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_vocab_size(len(tokens))
    if kind == "rerank":
        writer.add_layer_norm_eps(1e-12)
        writer.add_causal_attention(False)
        writer.add_token_type_count(2)
        writer.add_pooling_type(gguf.PoolingType.RANK)
        writer.add_sep_token_id(2)
    else:
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(HEAD_WIDTH)
        writer.add_rope_freq_base(10000.0)
    if kind == "embed":
        writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token.text for token in tokens])
    writer.add_token_scores([float(token.score) for token in tokens])
    writer.add_token_types([int(token.type) for token in tokens])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(kind != "chat")
    writer.add_add_space_prefix(True)
    writer.add_chat_template(TEMPLATE)


def _write_decoder(
    writer: gguf.GGUFWriter, source: np.random.Generator, tokens: list[Token], layers: int
) -> None:
    """Weights of a llama: shapes are [out, in]."""
    writer.add_tensor("token_embd.weight", _noise(source, len(tokens), WIDTH, scale=1.0))
    for layer in range(layers):
        block = f"blk.{layer}."
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}{norm}.weight", np.ones(WIDTH, np.float32))
        for name, rows, columns in (
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", HEAD_WIDTH * KV_HEADS, WIDTH),
            ("attn_v", HEAD_WIDTH * KV_HEADS, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_gate", INNER, WIDTH),
            ("ffn_up", INNER, WIDTH),
            ("ffn_down", WIDTH, INNER),
        ):
            writer.add_tensor(f"{block}{name}.weight", _noise(source, rows, columns))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    output = _noise(source, len(tokens), WIDTH, scale=0.3)
    words = {f"{SPACE}{word}" for word in WORDS}
    # Whole words alone can win: no raw bytes, no control tokens, no end before max_tokens.
    output[[token.text not in words for token in tokens]] = 0.0
    writer.add_tensor("output.weight", output)


def _write_encoder(
    writer: gguf.GGUFWriter, source: np.random.Generator, tokens: int, context: int, layers: int
) -> None:
    """Weights of a BERT with a classifier of one output."""
    writer.add_tensor("token_embd.weight", _noise(source, tokens, WIDTH, scale=1.0))
    writer.add_tensor("token_types.weight", _noise(source, 2, WIDTH, scale=0.05))
    writer.add_tensor("position_embd.weight", _noise(source, context, WIDTH, scale=0.05))
    _write_norm(writer, "token_embd_norm")
    for layer in range(layers):
        block = f"blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            _write_linear(writer, source, f"{block}{name}", WIDTH, WIDTH)
        _write_linear(writer, source, f"{block}ffn_up", INNER, WIDTH)
        _write_linear(writer, source, f"{block}ffn_down", WIDTH, INNER)
        _write_norm(writer, f"{block}attn_output_norm")
        _write_norm(writer, f"{block}layer_output_norm")
    _write_linear(writer, source, "cls", WIDTH, WIDTH)
    _write_linear(writer, source, "cls.output", 1, WIDTH)


def _write_norm(writer: gguf.GGUFWriter, name: str) -> None:
    writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.add_tensor(f"{name}.bias", np.zeros(WIDTH, np.float32))


def _write_linear(
    writer: gguf.GGUFWriter, source: np.random.Generator, name: str, rows: int, columns: int
) -> None:
    writer.add_tensor(f"{name}.weight", _noise(source, rows, columns))
    writer.add_tensor(f"{name}.bias", np.zeros(rows, np.float32))


def _noise(
    source: np.random.Generator, rows: int, columns: int, scale: float | None = None
) -> Array:
    """Normal noise; without `scale`, such that a product keeps the size of its input."""
    spread = columns**-0.5 if scale is None else scale
    return (source.standard_normal((rows, columns)) * spread).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", choices=get_args(Kind), default="chat")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--broken", action="store_true", help="end the file within its weights")
    given = parser.parse_args()
    if given.broken:
        write_broken(given.out, given.kind)
    else:
        write(given.out, given.kind, seed=given.seed)


if __name__ == "__main__":
    main()
