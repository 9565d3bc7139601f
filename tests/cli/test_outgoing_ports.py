"""A range that the kernel may give to outgoing connections is warned of by the command itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from gpustack.lib.platform import outgoing_ports


def test_check_warns_of_ports_that_may_be_taken_and_says_what_to_do(tmp_path: Path) -> None:
    outgoing = outgoing_ports()
    if outgoing is None:
        pytest.skip("this system does not say which ports it gives away")
    given, reserved = outgoing
    first = next(port for port in reversed(given) if port not in reserved) - 9
    ports = f"{first}-{first + 9}"
    argv = ["config", "check", "--data-dir", str(tmp_path), "--service-port-range", ports]
    done = subprocess.run([sys.executable, "-m", "gpustack", *argv], capture_output=True, text=True)
    assert done.returncode == 0
    assert f"Warning: --service-port-range {ports}: this system gives ports" in done.stderr
    assert "sysctl -w net.ipv4.ip_local_reserved_ports=" in done.stderr
