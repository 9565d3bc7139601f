"""The rules of tests/conftest.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SKIPPING = {
    "in a test": "import pytest\ndef test_a():\n    pytest.skip('install it with: apt get it')\n",
    "of a module": "import pytest\npytest.skip('apt get it', allow_module_level=True)\n",
    "by a mark": "import pytest\n@pytest.mark.skip('apt get it')\ndef test_a():\n    pass\n",
}


@pytest.mark.parametrize("kind", SKIPPING)
@pytest.mark.parametrize(("ci", "status"), [("true", {1, 2}), ("", {0, 5})])
def test_a_skip_fails_under_ci_and_nowhere_else(
    kind: str, ci: str, status: set[int], tmp_path: Path
) -> None:
    (tmp_path / "test_it.py").write_text(SKIPPING[kind])
    # Not asyncio's plugin: its settings are in pyproject.toml, which is out of reach there.
    words = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "tests.conftest"]
    done = subprocess.run(
        [*words, "--rootdir", str(tmp_path), "-c", os.devnull, str(tmp_path)],
        env=os.environ | {"CI": ci}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode in status, done.stdout + done.stderr
    assert "apt get it" in done.stdout
