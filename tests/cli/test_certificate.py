"""`gpustack config check` of a certificate: what `start` refuses, it refuses."""

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from tests.cli.conftest import environment
from tests.support.certificate import Issued, expire, issue


def check(data_dir: Path, certificate: Issued) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "gpustack",
            "config",
            "check",
            "--service-port-range",
            "20000-20063",
            *certificate.options,
        ],
        env=environment(data_dir),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_what_start_refuses_is_refused_and_what_clients_refuse_is_warned_of(
    tmp_path: Path,
) -> None:
    good, other = issue(tmp_path, "good"), issue(tmp_path, "other")
    locked = issue(tmp_path, "locked", password="secret")
    assert (check(tmp_path, good).returncode, check(tmp_path, good).stderr) == (0, "")
    for wrong, why in (
        (Issued(good.certfile, other.keyfile), "the key is not the certificate's"),
        (locked, "is encrypted"),
    ):
        refused = check(tmp_path, wrong)
        assert refused.returncode == 1
        assert refused.stderr.startswith("Error: --ssl-")
        assert why in refused.stderr
        assert "Traceback" not in refused.stderr
    expired = check(tmp_path, expire(issue(tmp_path, "old"), datetime(2024, 2, 29, tzinfo=UTC)))
    assert expired.returncode == 0
    assert "clients refuse the certificate, since it expired on 2024-02-29" in expired.stderr
