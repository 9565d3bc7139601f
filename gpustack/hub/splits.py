"""Names of GGUF files: one model in several parts, and which of a repository is meant. Pure."""

import difflib
import fnmatch
import re
from collections.abc import Sequence

from gpustack.errors import Invalid, NotFound
from gpustack.schemas.models import ModelSource, Source

#: Source: llama.cpp's llama_split_path, "%s-%05d-of-%05d.gguf".
_PART = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf", re.DOTALL)
MAX_PARTS = 1000


def parts(name: str) -> list[str]:
    """All files of the model that `name` is a part of, the first one first.

    A name of no such pattern is its own only part.
    """
    found = _PART.fullmatch(name)
    if not found or not 1 <= int(found["parts"]) <= MAX_PARTS:
        return [name]
    count = int(found["parts"])
    return [f"{found['stem']}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]


def choose(names: Sequence[str], wanted: str | None, where: str) -> list[str]:
    """The files of the one model that `wanted` means among `names`, the first part first.

    Args:
        wanted: a name, or a pattern such as *Q4_K_M.gguf; None: the only GGUF file there is.
        where: the repository, for messages.

    Raises:
        NotFound: there is none; the message names the nearest.
        Invalid: several are meant.
    """
    if wanted in names:
        matching = [str(wanted)]
    else:
        matching = [n for n in names if fnmatch.fnmatchcase(n, wanted or "*.gguf")]
    models = list(dict.fromkeys(parts(name)[0] for name in matching))
    if len(models) > 1:
        shown = ", ".join(models[:5]) + (", …" if len(models) > 5 else "")
        raise Invalid(f"{where} has {len(models)} files that {wanted or 'GGUF'} means: {shown}")
    if not models:
        raise NotFound(_absence(names, wanted, where))
    found = parts(models[0])
    if missing := set(found) - set(names):
        raise NotFound(f"{where} lacks {min(missing)}, one of {len(found)} parts")
    return found


def share_files(one: ModelSource, other: ModelSource) -> bool:
    """Whether two sources may stand for a file that both have."""
    if one.identity == other.identity:
        return True
    if not one.source is other.source is Source.HUGGING_FACE:
        return False
    names = (one.huggingface_filename, other.huggingface_filename)
    return one.huggingface_repo_id == other.huggingface_repo_id and _may_be_same(*names)


def _may_be_same(one: str | None, other: str | None) -> bool:
    if _is_pattern(one) and _is_pattern(other):
        return True
    if _is_pattern(one):
        one, other = other, one
    names = parts(one or "")
    if _is_pattern(other):
        return any(fnmatch.fnmatchcase(name, other or "*") for name in names)
    return other in names


def _is_pattern(name: str | None) -> bool:
    return not name or not {"*", "?", "["}.isdisjoint(name)


def _absence(names: Sequence[str], wanted: str | None, where: str) -> str:
    if wanted is None:
        return f"{where} has no GGUF file"
    files = [name for name in names if name.endswith(".gguf")]
    near = difflib.get_close_matches(wanted, files, n=1, cutoff=0.3) or files[:1]
    hint = f"; the nearest is {near[0]}" if near else " and no GGUF file at all"
    return f"{where} has no file {wanted}{hint}"
