"""Files that say what a cluster should be: what is right, and where it is wrong."""

import io
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpustack.cli.manifest import NotApplicable, parse, read, render
from gpustack.schemas.models import Model, ModelSpec, Rollout, RolloutState
from tests.support.model_specs import specs

GOOD = """\
# models of the team
models:
- name: tiny
  source: local_path
  local_path: /models/tiny.gguf
  backend_parameters: [--ctx-size=256]
- {name: "org/big:7b", source: huggingface, huggingface_repo_id: org/x-GGUF}
"""


def model(**spec: Any) -> Model:
    now = datetime.now(UTC)
    rollout = Rollout(generation=1, state=RolloutState.DONE, versions=[])
    return Model(id=1, generation=1, rollout=rollout, created_at=now, updated_at=now, **spec)


def spec_of(one: ModelSpec) -> dict[str, Any]:
    return one.model_dump(include=set(ModelSpec.model_fields))


def test_a_file_names_models_with_what_differs_from_the_default() -> None:
    manifest, _ = parse(GOOD, "f.yaml")
    assert manifest.models
    assert [one.name for one in manifest.models] == ["tiny", "org/big:7b"]
    assert manifest.models[0].backend_parameters == ["--ctx-size=256"]
    text = render([model(**spec_of(one)) for one in manifest.models])
    assert text.splitlines()[1:] == [
        "models:",
        "- name: tiny",
        "  source: local_path",
        "  local_path: /models/tiny.gguf",
        "  backend_parameters:",
        "  - --ctx-size=256",
        "- name: org/big:7b",
        "  source: huggingface",
        "  huggingface_repo_id: org/x-GGUF",
    ]


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}\n"])
def test_a_file_may_say_nothing(text: str) -> None:
    assert parse(text, "f.yaml")[0].models is None
    assert parse("models: []", "f.yaml")[0].models == []


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("models:\n", "f:1: models: want a list; [] is one without any"),
        ("modles: []\n", "f:1: unknown kind modles: want models"),
        ("models: []\nroutes: []\n", "f:2: routes cannot be applied yet; only models can"),
        ("- name: x\n", "f:1: want kinds, such as models:"),
        ("models: []\nmodels: []\n", "f:2: models is there twice, first in line 1"),
        (f"{GOOD}  env: {{A: 1}}\n", "f:8: not YAML"),
        (GOOD.replace("tiny\n", "tiny\n  name: b\n"), "f:4: name is there twice, first in line 3"),
        (GOOD.replace("org/big:7b", "tiny"), "f:7: model tiny is there twice"),
        (GOOD.replace("  local_path: /", "  loacl_path: /"), "f:5: model tiny: loacl_path: unk"),
        (GOOD.replace("/models/tiny.gguf", "7"), "f:5: model tiny: local_path: Input should be"),
        (GOOD.replace("name: tiny", "name: a b"), "f:3: model a b: name: want 1 to 128 of A-Z"),
        (GOOD.replace("name: tiny", "nome: tiny"), "f:3: name: Field required"),
        (GOOD.replace("[--ctx-size=256]", "[a, 1]"), "f:6: model tiny: backend_parameters.1: Inp"),
        (GOOD.replace("source: local_path", "source: ftp"), "f:4: model tiny: source: Input"),
        (GOOD.replace("  local_path: /models/tiny.gguf\n", ""), "f:3: model tiny: source local_pa"),
        ("models: {}\n", "f:1: models: Input should be a valid list"),
        (GOOD.replace("/models/tiny.gguf", r'"/m\0"'), "f:5: models.0.local_path: a text holds"),
        (GOOD.replace("/models/tiny.gguf", r'"\ud800"'), "f:5: models.0.local_path: a text holds"),
        ("models: &a\n- *a\n", "f:1: it stands within itself"),
        ("models:\n- 7\n", "f:2: Input should be a valid dictionary"),
        ("models: [\n\n", "f:3: not YAML"),
        ("a: \x01\n", "f:1: not YAML: a character that it forbids"),
        ("a: 2026-99-99\n", "f:1: not YAML that can be read"),
        ("[" * 5000, "f:1: not YAML that can be read"),
        ("a: &a {b: [*a]}\n", "f:1: it stands within itself"),
        ("a: [&b [1], *b, *b]\n", "f:1: unknown kind a"),
        ("? [a]\n: 1\n", "f:1: not YAML"),
        ("models: []\n---\nmodels: []\n", "f:2: not YAML"),
    ],
)  # fmt: skip
def test_errors_name_file_and_line(text: str, error: str) -> None:
    with pytest.raises(NotApplicable) as raised:
        parse(text, "f")
    assert str(raised.value).startswith(error)
    assert "\n" not in str(raised.value)


def test_a_file_of_another_encoding_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.yaml"
    file.write_bytes(b"# one\n# t\xe4glich\n")
    with pytest.raises(NotApplicable, match=r"m\.yaml:2: not UTF-8"):
        read(file)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"models: 7")))
    with pytest.raises(NotApplicable, match="standard input:1: "):
        read(Path("-"))


@given(st.lists(specs(), max_size=3, unique_by=lambda spec: spec["name"]))
def test_what_is_rendered_says_the_same_when_it_is_read(wanted: list[dict[str, Any]]) -> None:
    models = [model(**spec) for spec in wanted]
    manifest, _ = parse(render(models), "f")
    assert [spec_of(one) for one in manifest.models or []] == [spec_of(one) for one in models]
