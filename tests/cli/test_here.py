"""How commands find the node of this machine."""

import subprocess
import sys
from pathlib import Path

import pytest

from gpustack.config.load import data_dir
from gpustack.errors import SettingsError
from gpustack.lib.platform import default_data_dir
from tests.cli.conftest import environment


def test_the_data_directory_is_the_one_that_start_would_take(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data-dir: /of/the/file\nport: nonsense\nprot: 1\n")
    named = {"GPUSTACK_CONFIG_FILE": str(file)}
    assert data_dir({}, {}) == default_data_dir()
    assert data_dir({}, named) == data_dir({"config_file": str(file)}, {}) == Path("/of/the/file")
    assert data_dir({}, named | {"GPUSTACK_DATA_DIR": "/v"}) == Path("/v")
    assert data_dir({"data_dir": "/f"}, named | {"GPUSTACK_DATA_DIR": "/v"}) == Path("/f")
    file.write_text("debug: true\n")
    assert data_dir({}, named) == default_data_dir()
    with pytest.raises(SettingsError, match="option --data-dir: want a value"):
        data_dir({"data_dir": ""}, {})
    with pytest.raises(SettingsError, match=r"cannot read config file .*none\.yaml"):
        data_dir({"config_file": str(tmp_path / "none.yaml")}, {})


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("restart", "Error: no node runs on data directory {0}\n"),
        ("reload-config", "Error: no node runs on data directory {0}\n"),
        ("reset-admin-password", "Error: no server has run here yet: there is no {0}/database.db"),
    ],
)
def test_commands_know_the_config_file(tmp_path: Path, command: str, said: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"data_dir: {tmp_path}/there\n")
    variables = environment(tmp_path) | {"GPUSTACK_DATA_DIR": ""}
    for words, more in (
        (["--config-file", str(file)], {}),
        ([], {"GPUSTACK_CONFIG_FILE": str(file)}),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "gpustack", command, *words],
            env=variables | more, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.startswith(said.format(tmp_path / "there"))
    help = subprocess.run(
        [sys.executable, "-m", "gpustack", command, "--help"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "Data directory of the node here." in help.stdout
