"""PURE: the reference page of `gpustack start`, in each language, from the one table.

`python -m gpustack.config.reference DOCS` writes the pages below DOCS (`make docs`).
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpustack.config.option import Option, Text
from gpustack.config.options import (
    FILE_KEYS,
    VARIABLES,
    WAITING,
    defaults,
    options,
    shown_default,
)
from gpustack.config.values import to_json

LANGUAGES = ("en", "zh")
PAGES = {"en": "cli-reference/start.md", "zh": "zh/cli-reference/start.md"}

_TITLE = "# gpustack start\n"
_GENERATED = "<!-- Made from gpustack/config by `make docs`; edit there. -->\n"
_INTRODUCTION = Text(
    """\
Run a node: a server with its worker, or with `--server-url` a worker alone.

```bash
gpustack start [OPTIONS]
```

Every option can also be given as a variable (`--data-dir` is `GPUSTACK_DATA_DIR`) or in a YAML
file (`data_dir`, see [below](#config-file)). The command line wins over the variable, the variable
over the file, the file over the default. A list is an option given several times, JSON in a
variable, a list in YAML. `gpustack config show` prints what is in effect and where it comes from;
`gpustack config check` looks for mistakes without starting.

Marks: ⟳ taken by a running node through `gpustack reload-config`; ⏳ accepted, has no effect in
this version yet.
""",
    """\
运行一个节点：服务器及其内置工作节点；给出 `--server-url` 时只运行工作节点。

```bash
gpustack start [选项]
```

每个选项也可以用环境变量（`--data-dir` 对应 `GPUSTACK_DATA_DIR`）或 YAML 文件（`data_dir`，见
[下文](#配置文件)）给出。命令行优先于环境变量，环境变量优先于文件，文件优先于默认值。列表在命令行上
重复给出选项，在环境变量中写作 JSON，在 YAML 中写作列表。`gpustack config show` 打印生效的值及其
来源；`gpustack config check` 不启动，只检查错误。

标记：⟳ 可通过 `gpustack reload-config` 在运行中生效；⏳ 可以给出，但在此版本中尚未生效。
""",
)
_HEADINGS = {
    "common": Text("Common options", "通用选项"),
    "server": Text("Server options", "服务器选项"),
    "worker": Text("Worker options", "工作节点选项"),
}
_COLUMNS = Text(
    "| Option | Default | Meaning |\n| --- | --- | --- |\n",
    "| 选项 | 默认值 | 说明 |\n| --- | --- | --- |\n",
)
_CHOICES = Text("One of {}.", "可选值：{}。")
_DEPRECATED = Text("Deprecated: use `{}`.", "已弃用：请使用 `{}`。")
_ALSO = Text("Also `{}`.", "也可用 `{}`。")
_VARIABLES = Text(
    "## Other variables\n\n| Variable | Meaning |\n| --- | --- |\n",
    "## 其他环境变量\n\n| 环境变量 | 说明 |\n| --- | --- |\n",
)
_FILE = Text(
    "## Config file\n\nAll keys with their defaults; a key without a value is not set:\n",
    "## 配置文件\n\n所有键及其默认值；没有值的键表示未设置：\n",
)


def page(language: str) -> str:
    """The whole page, Markdown.

    Args:
        language: one of `LANGUAGES`.
    """
    tongue = LANGUAGES.index(language)
    parts = [_TITLE, _GENERATED, _INTRODUCTION[tongue]]
    for group, heading in _HEADINGS.items():
        rows = [_row(known, tongue) for known in options() if known.group == group]
        parts.append(f"## {heading[tongue]}\n\n{_COLUMNS[tongue]}{''.join(rows)}")
    variables = [f"| {_code(name)} | {_cell(text[tongue])} |\n" for name, text in VARIABLES.items()]
    parts.append(_VARIABLES[tongue] + "".join(variables))
    example = "\n".join(_example(tongue))
    parts.append(f"{_FILE[tongue]}\n```yaml\n{example}\n```\n")
    return "\n".join(parts)


def _row(known: Option, tongue: int) -> str:
    plain = shown_default(defaults()[known.key])
    default = known.shown_default[tongue] if known.shown_default else plain
    if default == plain and default:
        default = f"`{default}`"
    notes = [known.meaning[tongue]]
    if known.choices:
        notes.append(_CHOICES[tongue].format(", ".join(f"`{one}`" for one in known.choices)))
    if known.deprecated:
        notes.append(_DEPRECATED[tongue].format(known.deprecated))
    if known.env:
        notes.append(_ALSO[tongue].format(", ".join(known.env)))
    marks = "".join(
        mark for mark, holds in (("⟳", known.hot), ("⏳", known.key in WAITING)) if holds
    )
    cells = (_code(known.usage("")), _cell(default), _cell(" ".join([*notes, marks]).strip()))
    return f"| {' | '.join(cells)} |\n"


def _code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


def _cell(text: str) -> str:
    """`text` for a table: placeholders are no HTML, and a bar ends no cell."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


def _example(tongue: int) -> Iterator[str]:
    unset = defaults()
    for group, heading in _HEADINGS.items():
        yield f"# {heading[tongue]}"
        for known in options():
            if known.group == group and known.key != "config_file" and not known.deprecated:
                yield f"{known.key}: {_yaml(known, unset[known.key])}".rstrip()
        yield ""
    yield from (f"# {text[tongue]}\n{key}:" for key, text in FILE_KEYS.items())


def _yaml(known: Option, value: Any) -> str:
    """A default in YAML's flow style; where it is none, nothing."""
    plain = to_json(value)
    if plain is None:
        return ""
    return plain if isinstance(plain, str) and plain != "*" else json.dumps(plain)


def main() -> None:
    for language in LANGUAGES:
        path = Path(sys.argv[1]) / PAGES[language]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(language), encoding="utf-8")


if __name__ == "__main__":
    main()
