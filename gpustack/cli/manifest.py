"""Files that say what a cluster should be: YAML, each object with the line it stands in."""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpustack.errors import GPUStackError

if TYPE_CHECKING:
    from gpustack.schemas.apply import Manifest
    from gpustack.schemas.models import Model

MODELS = "models"
#: Kinds that files will have; naming one now is a mistake of its own.
LATER = ("routes", "users", "api-keys")
_ODD_BREAKS = re.compile("[\x85\u2028\u2029\ufeff]")
HEADER = "# gpustack apply -f FILE brings a cluster to this; what is left out is the default.\n"


class NotApplicable(GPUStackError):
    """The file cannot be applied."""

    code = "not_applicable"


class Source:
    """A file and where in it things stand.

    Args:
        name: as people call it.
        root: the YAML node of the whole.
    """

    def __init__(self, name: str, root: Any) -> None:
        self.name = name
        self._root = root

    def wrong(self, place: Sequence[str | int], what: str) -> NotApplicable:
        """The error that names the line of `place`: keys and indexes from the top.

        Of what is not there, the line of that in which it should be.
        """
        node, line = self._root, 1
        for word in map(str, place):
            found = next((child for child in _children(node) if child[0] == word), None)
            if found is None:
                break
            _, line, node = found
        return NotApplicable(f"{self.name}:{line}: {what}")


def _children(node: Any) -> Iterator[tuple[str, int, Any]]:
    """Of a YAML node: key or index, line, node."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield key.value, key.start_mark.line + 1, value
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield str(index), value.start_mark.line + 1, value


def read(path: Path) -> "tuple[Manifest, Source]":
    """What the file says, checked as far as that takes no server.

    Args:
        path: - is the standard input.

    Raises:
        NotApplicable: it is no YAML, or says something impossible; the sentence has the line.
        OSError: it cannot be read.
    """
    name = "standard input" if str(path) == "-" else str(path)
    raw = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise NotApplicable(f"{name}:{line}: not UTF-8") from None
    return parse(text, name)


def parse(text: str, name: str) -> "tuple[Manifest, Source]":
    """`read`, of a text that is here."""
    from pydantic import ValidationError

    from gpustack.schemas.apply import Manifest

    content, source = _yaml(text, name)
    for kind in content:
        if kind in LATER:
            raise source.wrong([kind], f"{kind} cannot be applied yet; only {MODELS} can")
        if kind != MODELS:
            raise source.wrong([kind], f"unknown kind {kind}: want {MODELS}")
    if MODELS in content and content[MODELS] is None:
        raise source.wrong([MODELS], f"{MODELS}: want a list; [] is one without any")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        # What no database can keep is found in the whole of it, and the message begins with where.
        place = first["loc"] or str(first["ctx"]["error"]).partition(":")[0].split(".")
        raise source.wrong(place, _said(first, content)) from None
    _check_names(manifest, source)
    return manifest, source


def _yaml(text: str, name: str) -> tuple[dict[str, Any], Source]:
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            source = Source(name, root)
            if root is None:
                return {}, source
            _check_keys(root, name, {})
            content = loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise NotApplicable(f"{name}:{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        line = text[: getattr(error, "position", 0)].count("\n") + 1
        raise NotApplicable(f"{name}:{line}: not YAML: a character that it forbids") from None
    except (ValueError, RecursionError):  # no such date; brackets without end
        raise NotApplicable(f"{name}:1: not YAML that can be read") from None
    if not isinstance(content, dict):
        raise NotApplicable(f"{name}:{root.start_mark.line + 1}: want kinds, such as {MODELS}:")
    return content, source


def _check_keys(node: Any, name: str, done: dict[int, bool]) -> None:
    """YAML itself lets a key stand there twice, and the last one wins; and it lets things hold
    themselves, so that they have no end.

    Args:
        done: by node, whether all that is in it was looked at.
    """
    if id(node) in done:  # an alias
        if not done[id(node)]:
            raise NotApplicable(f"{name}:{node.start_mark.line + 1}: it stands within itself")
        return
    done[id(node)] = False
    seen: dict[str, int] = {}
    for word, line, child in _children(node):
        if word in seen:
            message = f"{name}:{line}: {word} is there twice, first in line {seen[word]}"
            raise NotApplicable(message)
        seen[word] = line
        _check_keys(child, name, done)
    done[id(node)] = True


def _said(error: Any, content: dict[str, Any]) -> str:
    """What is wrong, with the name of the model and of the field."""
    kind, *rest = error["loc"] or ("",)  # without a place, it says where
    index = rest.pop(0) if rest else None
    owner = ""
    if isinstance(index, int) and isinstance(content[kind][index], dict):
        called = content[kind][index].get("name")
        owner = f"model {called}: " if isinstance(called, str) else ""
    field = ".".join(map(str, rest))
    said = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        said = "unknown field"
    if error["type"] == "string_pattern_mismatch" and field == "name":
        said = "want 1 to 128 of A-Z a-z 0-9 . _ : / -"
    if field:
        return f"{owner}{field}: {said}"
    return f"{kind}: {said}" if kind and index is None else f"{owner}{said}"


def _check_names(manifest: "Manifest", source: Source) -> None:
    seen: set[str] = set()
    for index, model in enumerate(manifest.models or []):
        if model.name in seen:
            raise source.wrong([MODELS, index, "name"], f"model {model.name} is there twice")
        seen.add(model.name)


def render(models: "Sequence[Model]") -> str:
    """A file that says what these models are; applied, it changes none of them."""

    from gpustack.schemas.models import ModelSpec

    fields = set(ModelSpec.model_fields)
    order = ["name", *(name for name in ModelSpec.model_fields if name != "name")]
    items = []
    for model in models:
        said = model.model_dump(mode="json", include=fields, exclude_defaults=True)
        items.append({name: said[name] for name in order if name in said})
    return HEADER + _dump({MODELS: items})


def _dump(content: Any) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes line ends of other alphabets: PyYAML writes them as they are, and folds them."""

        def represent_str(self, text: str) -> Any:
            style = '"' if _ODD_BREAKS.search(text) else None
            return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, Dumper.represent_str)
    return yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)
