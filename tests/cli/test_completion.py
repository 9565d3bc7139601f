"""What a shell offers, asked as shells do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

#: The console script stands beside the interpreter.
BIN = Path(sys.executable).parent
SHELLS = ("bash", "zsh", "fish")


def script(shell: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "gpustack", "completion", shell],
        capture_output=True, text=True, check=True, timeout=20,
    )  # fmt: skip
    return done.stdout


def offered(shell: str, *words: str) -> list[str]:
    """The protocol between a shell's script and the program: the line so far in variables."""
    *before, incomplete = words
    place = {"COMP_CWORD": incomplete if shell == "fish" else str(len(words))}
    line = {"COMP_WORDS": " ".join(["gpustack", *(before if shell == "fish" else words)])}
    done = subprocess.run(
        [sys.executable, "-m", "gpustack"],
        env=os.environ | line | place | {"_GPUSTACK_COMPLETE": f"{shell}_complete"},
        capture_output=True, text=True, check=True, timeout=20,
    )  # fmt: skip
    assert done.stderr == ""
    return [line for line in done.stdout.splitlines() if line]


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shells_script_asks_for_what_is_answered(shell: str) -> None:
    assert f"_GPUSTACK_COMPLETE={shell}_complete" in script(shell)
    assert any("reset-admin-password" in line for line in offered(shell, "reset"))
    assert any("embedded" in line for line in offered(shell, "start", "--gateway-mode", ""))


@pytest.mark.parametrize(
    ("words", "some"),
    [
        (["re"], {"plain,restart", "plain,reload-config", "plain,reset-admin-password"}),
        (["config", ""], {"plain,check", "plain,show"}),
        (["service", "un"], {"plain,uninstall"}),
        (["start", "--proxy"], {"plain,--proxy-mode"}),
        (["start", "--port", "1", "--proxy-mode", "t"], {"plain,tunnel"}),
        (["config", "show", "--gateway-mode", "in"], {"plain,in-cluster"}),
        (["start", "--data-dir", "/tm"], {"file,/tm"}),
        (["completion", ""], {f"plain,{shell}" for shell in SHELLS}),
        (["chat", "--he"], {"plain,--help"}),
        (["no-such-command", "x"], set()),
    ],
)
def test_commands_options_and_choices_are_offered_and_nothing_else(
    words: list[str], some: set[str]
) -> None:
    found = set(offered("bash", *words))
    assert found == some


def test_a_real_bash_completes(tmp_path: Path) -> None:
    if (bash := shutil.which("bash")) is None:
        return  # what its script would ask is tested above
    (tmp_path / "rc").write_text(script("bash"))
    asks = """
    source rc
    COMP_WORDS=(gpustack start --gateway-mode "$0"); COMP_CWORD=3
    $(complete -p gpustack | grep -o -- '-F [^ ]*' | cut -c4-) gpustack "$0" --gateway-mode
    echo "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        [bash, "--norc", "-c", asks, "e"], cwd=tmp_path, check=True, timeout=20, text=True,
        capture_output=True, env=os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.stdout.split() == ["embedded", "external"]
    assert done.stderr == ""


def test_commands_are_completed_without_importing_them() -> None:
    code = (
        "import sys; from gpustack.cli.app import main\n"
        "try: main(prog_name='gpustack')\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    line = {"COMP_WORDS": "gpustack ", "COMP_CWORD": "1", "_GPUSTACK_COMPLETE": "bash_complete"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | line, capture_output=True, text=True,
        timeout=20, check=False,
    )  # fmt: skip
    assert "plain,models" in done.stdout
    assert "gpustack.cli.models" not in done.stderr.split()
