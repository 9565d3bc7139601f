"""The header of a GGUF file: what it says of its model, and how large its tensors are.

Files come from anywhere, so every count and length is checked before it is believed: reading
never takes more than 64 KiB at a time, and any file at most some 2 s of a processor.

Source of the layout: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import struct
from dataclasses import dataclass
from typing import BinaryIO

from gpustack.errors import GPUStackError
from gpustack.schemas.profiles import Profile

VERSIONS = (2, 3)
MAX_TEXT_BYTES = 65_535  # keys; the values that are read are shorter still
#: Far above any file in use: the largest vocabularies have 262,144 tokens, files some 100 facts
#: and some 2,000 tensors.
MAX_FACTS, MAX_TENSORS, MAX_DIMENSIONS = 10_000, 100_000, 8
#: Of the whole header: texts and kept numbers in all lists (the largest vocabularies have 262,144
#: tokens and 514,906 merges; 2 million take 0.8 s), and its length.
MAX_ELEMENTS, MAX_BYTES = 2_000_000, 64 << 20
MAX_KEPT_NUMBERS = 4096
#: No count in a model's architecture is larger, its context excepted.
MAX_NUMBER, MAX_CONTEXT = 10**7, 10**9

TEXT, ARRAY = 8, 9
#: Value type -> struct code. The rest are texts and arrays.
NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
POOLING = {1: "mean", 2: "cls", 3: "last", 4: "rank"}

#: Tensor type -> (elements per block, bytes per block). Source: ggml's type traits.
BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    9: (32, 36), 10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18),
    21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8),
    28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip

Value = int | float | bool | str | list[int]


class Broken(GPUStackError):
    """The file is not a GGUF file that can be read."""

    status, code = 422, "invalid"


class Short(Broken):
    """The file ends within its header."""


@dataclass(frozen=True, slots=True)
class Header:
    """What was read.

    Attributes:
        facts: single values and short lists of whole numbers, by key.
        lengths: key -> elements, of every list.
        tensor_bytes: all tensors together, as stored; None when a tensor's type is not known.
        end: where the file must end at the earliest, were it whole.
    """

    facts: dict[str, Value]
    lengths: dict[str, int]
    tensor_bytes: int | None
    end: int


class _Cursor:
    """A place in the file, that never moves beyond `size`."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._elements = 0
        self.position = 0

    def take(self, count: int) -> bytes:
        self._advance(count)
        content = self._file.read(count)
        if len(content) < count:
            raise Short
        return content

    def skip(self, count: int) -> None:
        self._advance(count)
        self._file.seek(count, 1)

    def skip_texts(self, count: int) -> None:
        read, seek, limit = self._file.read, self._file.seek, min(self._size, MAX_BYTES)
        for _ in range(count):  # by the million: without calls of ours
            content = read(8)
            if len(content) < 8:
                raise Short
            length = int.from_bytes(content, "little")
            self.position += 8 + length
            if self.position > limit:
                break
            if length:
                seek(length, 1)
        self._advance(0)

    def number(self, code: str) -> int:
        value = self.any(code)
        return int(value)

    def any(self, code: str) -> int | float | bool:
        value: int | float | bool
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))
        return value

    def text(self) -> str:
        length = self.number("Q")
        if length > MAX_TEXT_BYTES:
            raise Broken(f"its header has a text of {length} bytes where a name should be")
        return self.take(length).decode(errors="replace")

    def spend(self, elements: int, what: str) -> None:
        """Count elements of lists before they are read."""
        self._elements += elements
        if self._elements > MAX_ELEMENTS:
            raise Broken(f"its header claims {self._elements} {what} in lists")

    def _advance(self, count: int) -> None:
        self.position += count
        if self.position > self._size:
            raise Short
        if self.position > MAX_BYTES:
            raise Broken(f"its header is longer than {MAX_BYTES} bytes")


def read(file: BinaryIO, size: int) -> Header:
    """The header of the GGUF file that `file` stands at the beginning of.

    Args:
        size: of the whole file, bytes, even where `file` has only its beginning.

    Raises:
        Short: `file` ends before the header does.
        Broken: it is no GGUF file, or one that no program would write.
    """
    cursor = _Cursor(file, size)
    if cursor.take(4) != b"GGUF":
        raise Broken("it is not a GGUF file: the first four bytes are not GGUF")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise Broken(f"its GGUF version {version & 0xFFFF or version} is not 2 or 3")
    tensors, count = cursor.number("Q"), cursor.number("Q")
    if tensors > MAX_TENSORS or count > MAX_FACTS:
        raise Broken(f"its header claims {tensors} tensors and {count} facts")
    facts: dict[str, Value] = {}
    lengths: dict[str, int] = {}
    for _ in range(count):
        _read_fact(cursor, facts, lengths)
    alignment = facts.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
        raise Broken(f"its header claims an alignment of {alignment!r}")
    return _read_tensors(cursor, tensors, alignment, facts, lengths)


def _read_fact(cursor: _Cursor, facts: dict[str, Value], lengths: dict[str, int]) -> None:
    key = cursor.text()
    kind = cursor.number("I")
    if kind in NUMBERS:
        facts[key] = cursor.any(NUMBERS[kind])
    elif kind == TEXT:
        length = cursor.number("Q")
        if length <= 256:
            facts[key] = cursor.take(length).decode(errors="replace")
        else:
            cursor.skip(length)  # chat templates, licences
    elif kind == ARRAY:
        element, length = cursor.number("I"), cursor.number("Q")
        lengths[key] = length
        found = _read_list(cursor, element, length)
        if found is not None:
            facts[key] = found
    else:
        raise Broken(f"its header has a value of unknown type {kind}")


def _read_list(cursor: _Cursor, element: int, length: int) -> list[int] | None:
    """Whole numbers, if they are few; everything else is passed over."""
    if element == TEXT:
        cursor.spend(length, "texts")
        cursor.skip_texts(length)
        return None
    code = NUMBERS.get(element)
    if code is None:
        raise Broken(f"its header has a list of unknown type {element}")
    if code in "fd" or length > MAX_KEPT_NUMBERS:
        cursor.skip(length * struct.calcsize(f"<{code}"))
        return None
    cursor.spend(length, "numbers")
    return [cursor.number(code) for _ in range(length)]


def _read_tensors(
    cursor: _Cursor,
    count: int,
    alignment: int,
    facts: dict[str, Value],
    lengths: dict[str, int],
) -> Header:
    total, end, known = 0, 0, True
    for _ in range(count):
        cursor.text()
        dimensions = cursor.number("I")
        if dimensions > MAX_DIMENSIONS:
            raise Broken(f"its header claims a tensor of {dimensions} dimensions")
        elements = 1
        for _ in range(dimensions):
            elements *= cursor.number("Q")
        kind, offset = cursor.number("I"), cursor.number("Q")
        if elements > 2**60 or offset > 2**60:
            raise Broken(f"its header claims a tensor of {elements} elements")
        per_block, block_bytes = BLOCKS.get(kind, (1, 0))
        size = -(-elements // per_block) * block_bytes
        known = known and kind in BLOCKS
        total += size
        end = max(end, offset + size)
    start = -(-cursor.position // alignment) * alignment
    return Header(facts, lengths, total if known else None, start + end if count else 0)


def profile(header: Header, *, weights_bytes: int, source: str) -> Profile:
    """What the header says of the model, as facts for memory estimates.

    Raises:
        Broken: it says what no model has.
    """
    architecture = header.facts.get("general.architecture", "")
    if not isinstance(architecture, str):
        raise Broken("its header names no architecture")

    def number(key: str, *, limit: int = MAX_NUMBER) -> int:
        name = f"{architecture}.{key}"
        value = header.facts.get(name, 0)
        if isinstance(value, list):  # one per layer
            value = max(value, default=0)
        if not isinstance(value, int) or not 0 <= value <= limit:
            raise Broken(f"its header says {name} is {value!r}, which no model has")
        return value

    heads, width = number("attention.head_count"), number("embedding_length")
    tokens = number("vocab_size") or header.lengths.get("tokenizer.ggml.tokens", 0)
    return Profile(
        weights_bytes=weights_bytes,
        architecture=architecture,
        layers=number("block_count"),
        attention_heads=heads,
        kv_heads=number("attention.head_count_kv") or heads,
        head_dim=number("attention.key_length") or (width // heads if heads else 0),
        embedding_length=width,
        vocabulary=min(tokens, MAX_NUMBER),
        max_context=number("context_length", limit=MAX_CONTEXT),
        pooling=POOLING.get(number("pooling_type"), ""),
        source=source,
    )
