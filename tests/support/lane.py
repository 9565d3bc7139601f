"""Run many tests at once: `python -m tests.support.lane ARGS` is pytest with ARGS.

A loaded machine bends limits of time. So what failed beside others is judged alone: of a few tests
that failed, each has to pass ROUNDS times in a row with nothing beside it. Then it is named as
unsteady, which whoever reads it mends, and does not fail the run. More than FEW are no accident.
"""

import subprocess
import sys
from typing import Final

import pytest

FEW: Final = 10
ROUNDS: Final = 3


class Failed:
    """A plugin of pytest that remembers which tests failed."""

    def __init__(self) -> None:
        self.ids: dict[str, None] = {}  # in order, each once

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.ids[report.nodeid] = None


def main(args: list[str]) -> int:
    """The exit code of pytest; 0 as well if all that failed is unsteady."""
    failed = Failed()
    code = int(pytest.main(args, plugins=[failed]))
    if code != pytest.ExitCode.TESTS_FAILED or not 0 < len(failed.ids) <= FEW:
        return code
    print(f"\n{len(failed.ids)} failed beside others; each now alone, {ROUNDS} times", flush=True)  # noqa: T201
    for _ in range(ROUNDS):
        alone = [sys.executable, "-m", "pytest", "-m", "", "--timeout", "600", *failed.ids]
        if subprocess.run(alone, check=False).returncode != 0:
            return code
    for name in failed.ids:
        print(f"UNSTEADY {name}: failed beside others, passed alone", flush=True)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
