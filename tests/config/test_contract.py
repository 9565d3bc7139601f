"""One table feeds everything: the contract, the help, the documents, the code that uses it."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click import Context

import gpustack
from gpustack.cli.start import HEADINGS, start
from gpustack.config.load import Loaded, load
from gpustack.config.options import (
    FILE_KEYS,
    VARIABLES,
    WAITING,
    Option,
    Settings,
    defaults,
    options,
)
from gpustack.config.reference import LANGUAGES, PAGES, page
from gpustack.config.values import to_json
from gpustack.lib.platform import default_data_dir

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONTRACT = yaml.safe_load((HERE / "start-options.yaml").read_text())
GROUPS = ("common", "server", "worker")
PROMISED = [
    *({"group": group, **each} for group in GROUPS for each in CONTRACT[group]),
    *CONTRACT["additions"],
]
#: Our parsers are finer than the contract's types.
TYPES = {
    "secret": "str", "host": "str", "duration": "str", "count": "int", "database": "url",
    "fingerprint": "str",
    "name": "str", "origins": "list", "tokens": "list", "labels": "list", "arguments": "list",
    "networks": "list", "reserved": "json",
}  # fmt: skip
#: What the contract says of defaults that no table can hold.
DESCRIBED = {
    "os-specific", "generated", "detected", "found on PATH", "upstream releases", "host name",
    "built in",
}  # fmt: skip


@pytest.mark.parametrize("promised", PROMISED, ids=lambda promised: str(promised["flag"]))
def test_every_option_is_as_the_contract_has_it(promised: dict[str, Any]) -> None:
    known = {known.flag: known for known in options()}[promised["flag"]]
    assert TYPES.get(known.kind, known.kind) == promised["type"]
    assert known.group == promised["group"]
    assert list(known.aliases) == promised.get("aliases", [])
    assert list(known.environment) == promised.get("env", [known.environment[0]])
    assert list(known.choices) == promised.get("choices", [])
    assert known.deprecated == promised.get("deprecated")
    default, wanted = to_json(defaults()[known.key]), promised["default"]
    if default != wanted:
        assert known.shown_default is not None
        assert wanted in DESCRIBED | {known.shown_default.en}


def test_there_is_no_option_beyond_the_contract() -> None:
    assert sorted(known.flag for known in options()) == sorted(e["flag"] for e in PROMISED)
    assert list(FILE_KEYS) == [each["key"] for each in CONTRACT["file"]]
    assert list(VARIABLES) == [each["name"] for each in CONTRACT["environment"]]
    assert all("since" in each for each in CONTRACT["additions"])


def test_help_has_every_option_under_its_heading() -> None:
    with Context(start) as context:
        text = start.get_help(context)
    for group, heading in HEADINGS.items():
        section = text.partition(f"{heading}:\n")[2].partition("\n\n")[0]
        listed = {
            word.strip(",")
            for line in section.splitlines()
            if line.startswith("  -")
            for word in line.split("  ")[1].split()
            if word.startswith("-")
        }
        wanted = [(known.flag, *known.aliases) for known in options() if known.group == group]
        assert listed == {name for names in wanted for name in names}


@pytest.mark.parametrize("known", list(options()), ids=lambda known: str(known.key))
def test_every_option_is_explained_in_both_languages(known: Option) -> None:
    english, chinese = known.meaning
    assert english.isascii()
    assert english.endswith(".")
    assert chinese.endswith("。")
    assert any("\u4e00" <= character <= "\u9fff" for character in chinese)


def _read_somewhere() -> set[str]:
    """Fields that code beyond `config`, or a property of Settings, reads."""
    package = Path(gpustack.__file__).parent
    found: set[str] = set()
    for file in package.rglob("*.py"):
        inside = file.is_relative_to(package / "config")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute):
                continue
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
            if (name.endswith("settings") and not inside) or (name == "self" and inside):
                found.add(node.attr)
    return found


def test_the_options_that_nothing_reads_are_exactly_those_that_say_so() -> None:
    """Whoever makes one work takes it off the list; nobody may add to it."""
    deprecated = {known.key for known in options() if known.deprecated}
    unread = defaults().keys() - _read_somewhere() - deprecated - {"config_file"}
    assert unread == WAITING
    assert len(WAITING) <= 50


def test_an_option_without_effect_says_so_when_it_is_given() -> None:
    (warning,) = load({"enable_ray": True}, {}).warnings
    assert warning == "option --enable-ray: has no effect in this version yet"


def _example(name: str, tmp_path: Path) -> Loaded:
    """The document's example with real paths and a port for its placeholders."""
    text = (HERE / "examples" / name).read_text()
    for placeholder in ("data_dir", "cache_dir", "log_dir", "keyfile", "certfile"):
        place = tmp_path / placeholder
        if placeholder.endswith("file"):
            place.touch()
        text = text.replace(f"/path/to/{placeholder}", str(place))
    file = tmp_path / name
    file.write_text(text.replace(":port/", ":5432/"))
    return load({"config_file": str(file)}, {})


@pytest.mark.parametrize("name", ["v0.6.yaml", "v0.7.yaml", "v2.0.yaml"])
def test_the_examples_of_the_existing_products_documents_load(name: str, tmp_path: Path) -> None:
    loaded = _example(name, tmp_path)
    got = loaded.settings
    given = yaml.safe_load((tmp_path / name).read_text())
    moved = {"worker_ip", "metrics_port", "disable_metrics"}
    parsed = {key: getattr(got, key) for key in given.keys() - moved}
    assert all(value is not None for value in parsed.values())
    assert got.port == 80
    assert got.system_reserved == (2, 1)
    assert got.worker_metrics_port == 10151
    assert any("--worker-ip" in warning or "worker_ip" in warning for warning in loaded.warnings)
    assert got.advertise_address == given.get("advertise_address", "192.168.1.101")
    assert not got.is_server


@pytest.mark.parametrize(
    ("platform", "appdata", "place"),
    [
        ("linux", None, "/var/lib/gpustack"),
        ("darwin", None, "/var/lib/gpustack"),
        ("win32", "C:/Users/me/AppData/Roaming", "C:/Users/me/AppData/Roaming/gpustack"),
    ],
)
def test_defaults_of_each_system(platform: str, appdata: str | None, place: str) -> None:
    assert default_data_dir(platform, appdata) == Path(place)
    debug = next(known for known in options() if known.key == "debug")
    assert debug.aliases_on(platform) == (() if platform == "win32" else ("-d",))


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_reference_page_is_what_the_table_says(language: str) -> None:
    """`make docs` writes it."""
    there = (ROOT / "docs" / PAGES[language]).read_text(encoding="utf-8")
    assert there == page(language)
    assert all(f"`{known.flag}" in there for known in options())


def test_the_config_file_of_the_reference_page_loads_and_is_the_default(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    text = page("en").partition("```yaml\n")[2].partition("```")[0]
    assert {known.key for known in options() if f"{known.key}:" in text} >= defaults().keys() - {
        "config_file", "worker_ip", "resources",
    }  # fmt: skip
    file.write_text(text)
    loaded = load({"config_file": str(file)}, {})
    assert loaded.warnings == ()
    assert dataclasses.replace(loaded.settings, config_file=None) == load({}, {}).settings


def test_settings_are_frozen_and_importing_them_touches_nothing() -> None:
    with pytest.raises(AttributeError):
        load({}, {}).settings.port = 1  # type: ignore[misc]
    code = (
        "import sys, gpustack.config.load; print('yaml' in sys.modules, 'asyncio' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "False"
    assert isinstance(load({}, {}).settings, Settings)
