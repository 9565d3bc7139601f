"""`gpustack service install` where something stands in its way, or may not be shown."""

import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gpustack.cli import service_files
from gpustack.cli.service import put
from gpustack.cli.service_files import MARK, Service
from gpustack.errors import Conflict, Invalid
from tests.cli.conftest import environment


def test_a_config_file_that_is_there_becomes_private(tmp_path: Path) -> None:
    unit, config = tmp_path / "unit", tmp_path / "config"
    for path in (unit, config):
        path.write_text(MARK)
        path.chmod(0o644)
    put({unit: MARK, config: MARK}, private=config)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (unit, config)] == [0o644, 0o600]


def test_what_is_no_text_is_not_ours(tmp_path: Path) -> None:
    unit, config = tmp_path / "unit", tmp_path / "config"
    unit.write_bytes(b"\xff\xfe")
    with pytest.raises(Conflict, match=r"unit is there with another content.*not gpustack's"):
        put({config: MARK, unit: MARK}, private=config)
    unit.unlink()
    unit.mkdir()
    with pytest.raises(Conflict, match=r"unit is there with another content.*not gpustack's"):
        put({config: MARK, unit: MARK}, private=config)
    assert not config.exists()


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_no_word_of_a_unit_has_a_control_character(platform: str) -> None:
    def node(home: str) -> Service:
        variables = {"HOME": home, "PROGRAMDATA": home}
        places = service_files.places(platform, variables, for_user=platform != "win32")
        return Service(("gpustack",), ("gpustack",), {"PATH": "/bin"}, places, for_user=True)

    assert service_files.unit_text(platform, node("/home/me"))
    with pytest.raises(Invalid, match=r"control character: '.*\\nExecStartPre=evil"):
        service_files.unit_text(platform, node("/home/me\nExecStartPre=evil"))
    with pytest.raises(Invalid, match="control character: 'a\\\\tb'"):
        service_files.unit_text(platform, replace(node("/h"), command=("a\tb",)))


def test_a_dry_run_shows_no_password_of_a_url_and_no_key(tmp_path: Path) -> None:
    options = {
        "--server-external-url": "http://me:pass-word@server.example:8000",
        "--database-url": "postgresql://me:pass-word@db.example/gpustack",
        "--saml-security": '{"privateKey": "pass-word"}',
    }
    done = subprocess.run(
        [sys.executable, "-m", "gpustack", "service", "install", "--user", "--dry-run",
         *(word for pair in options.items() for word in pair)],
        env=environment(tmp_path) | {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "server.example:8000" in done.stdout
    assert "saml_security: (hidden)" in done.stdout
    assert "pass-word" not in done.stdout + done.stderr
