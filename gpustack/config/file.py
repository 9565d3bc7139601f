"""The config file: YAML, each value with the line it stands in."""

import difflib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from gpustack.config.values import SHOWN
from gpustack.errors import SettingsError


class Line(NamedTuple):
    """One value of the file, as YAML reads it, and where."""

    value: Any
    origin: str


class Content(NamedTuple):
    """What a file says: values by key, and a sentence for each line that is wrong."""

    lines: dict[str, Line]
    problems: list[str]


def read(path: Path, known: Collection[str], texts: Collection[str]) -> Content:
    """The file's values by key; a key without a value is left out.

    Args:
        known: the keys that may stand in it; a dash counts as an underscore.
        texts: those whose values are taken as they are written: YAML reads 010 as 8 and 1:30
            as 90, and nobody means that.

    Raises:
        SettingsError: the file cannot be read, or is not YAML. Never quotes what the file says:
            a secret may stand there.
    """
    import yaml  # only where there is a file

    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        try:
            root = loader.get_single_node()
            if isinstance(root, yaml.MappingNode):
                return _values(path, loader, root, known, texts)
        finally:
            loader.dispose()
    except OSError as error:
        raise SettingsError(f"cannot read config file {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"config file {path} is not YAML: {_problem(error)}") from None
    except (ValueError, RecursionError):  # no UTF-8, no such date, digits or brackets without end
        raise SettingsError(f"config file {path} is not YAML text in UTF-8") from None
    if root is None:
        return Content({}, [])
    raise SettingsError(f"config file {path}: want `option: value` lines")


def _values(
    path: Path, loader: Any, root: Any, known: Collection[str], texts: Collection[str]
) -> Content:
    content = Content({}, [])
    written = [id(key) for key, _ in root.value]  # what is merged from elsewhere gives way to it
    loader.flatten_mapping(root)
    seen: dict[str, str] = {}
    for key_node, value_node in root.value:
        name = str(loader.construct_object(key_node, deep=True))
        where = f"config file {path}, line {key_node.start_mark.line + 1}"
        key = name.replace("-", "_")
        if key not in known:
            content.problems.append(f"{where}: {_unknown(name, known)}")
            continue
        if key in seen and id(key_node) in written:
            content.problems.append(f"{where}: key {name} is there twice; first: {seen[key]}")
            continue
        if id(key_node) in written:
            seen[key] = where
        value = loader.construct_object(value_node, deep=True)
        if key in texts and isinstance(value_node.value, str) and value is not None:
            value = value_node.value
        if value is not None:
            content.lines[key] = Line(value, f"{where}, key {name}")
    return content


def _unknown(name: str, known: Collection[str]) -> str:
    if name.replace("-", "_") == "config_file":
        return "key config_file says nothing here: a config file names no other"
    near = difflib.get_close_matches(name.replace("-", "_").lower(), known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown key {name[:SHOWN]}{hint}"


def _problem(error: Exception) -> str:
    """What is wrong where, without the file's text: a secret may stand there."""
    # Quoted are single characters, <kinds of token>, and names out of the file.
    problem = getattr(error, "problem", None) or "a character that YAML forbids"
    problem = re.sub(r"'[^'<].+'", "'...'", problem)
    mark = getattr(error, "problem_mark", None)
    return f"{problem} at {mark.line + 1}:{mark.column + 1}" if mark else problem
