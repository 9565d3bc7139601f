"""The API does what its description says, whatever is asked: nothing else is ever answered.

The share of `make test-slow` is the same each time. `make soak` says its seed, and
GPUSTACK_TEST_SEED repeats it; GPUSTACK_TEST_EXAMPLES is its count of requests per operation and
phase.
"""

import os
import random
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from gpustack.lib import log_level
from tests.server.conftest import GATEWAY, JOIN, LOCAL_ADMIN, Plane
from tests.support.fuzzing import fuzzed, listening

SEED = int(os.environ.get("GPUSTACK_TEST_SEED", "") or random.randrange(10**6))
SOAK_EXAMPLES = int(os.environ.get("GPUSTACK_TEST_EXAMPLES", "") or 500)
MODEL = {"name": "m", "source": "local_path", "local_path": "/m.gguf"}


#: Every value at the edge of what is allowed, at random, and along links.
PHASES = "coverage,fuzzing,stateful"


class Share(NamedTuple):
    """How thoroughly, and from which seed on."""

    examples: int  # requests per operation and phase
    seed: int

    @property
    def options(self) -> tuple[str, ...]:
        return (
            f"--phases={PHASES}", f"--max-examples={self.examples}", f"--seed={self.seed}",
        )  # fmt: skip

    @property
    def settings(self) -> str:
        # Two walks along the links may follow none of them.
        return f"[phases.stateful.generation]\nmax-examples = {max(self.examples, 25)}\n"


SHARES = [
    pytest.param(Share(10, 1), marks=[pytest.mark.slow], id="share"),
    pytest.param(
        Share(SOAK_EXAMPLES, SEED),
        marks=[pytest.mark.soak, pytest.mark.timeout(18000)],
        id="full",
    ),
]
#: The one server error that is right: no agent answers on the worker of these tests.
NO_AGENT = """
[[operations]]
include-operation-id = [
  "read_instance_logs", "list_worker_engines", "get_worker_log_level", "set_worker_log_level",
]
checks.not_a_server_error.expected-statuses = ["2xx", "4xx", 503]
"""
ONLY_401 = """
[checks]
positive_data_acceptance.expected-statuses = [401]
negative_data_rejection.expected-statuses = [401]
"""
PUBLIC = (
    "healthz", "readyz", "get_version", "get_auth_config", "login", "begin_oidc_login",
    "finish_oidc_login", "get_saml_metadata", "begin_saml_login", "take_saml_response",
    "finish_saml_login", "take_saml_logout",
)  # fmt: skip
#: Who else there is -> what they may ask.
OTHERS = {
    "worker": ("report_worker", "beat", "announce_worker", "report_instance", "list_instances"),
    "gateway": ("add_usage_batch", "flush_watches", "list_models", "list_instances"),
    "joining": ("register_worker",),
}


async def secret_of(plane: Plane, who: str) -> str:
    if who == "worker":
        credential: str = (await plane.worker("w2")).registered["credential"]
        return credential
    return {"administrator": LOCAL_ADMIN, "gateway": GATEWAY, "joining": JOIN}[who]


async def check(
    plane: Plane, folder: Path, share: Share, *options: str, credential: str | None, settings: str
) -> str:
    """Fails with what was found; else the summary."""
    admin = await plane.admin()
    await plane.worker()
    assert (await admin.post("/v2/models", json=MODEL)).status_code == 201
    document, level = plane.app.openapi(), log_level.current()
    try:
        async with listening(plane.app) as url:
            code, said = await fuzzed(
                document, url, folder, *share.options, *options,
                credential=credential, settings=share.settings + settings,
            )  # fmt: skip
    finally:
        log_level.change(level)
    assert code == 0, said
    return said


@pytest.mark.parametrize("share", SHARES)
async def test_whatever_an_administrator_asks_is_answered_as_described(
    plane: Plane, tmp_path: Path, share: Share
) -> None:
    said = await check(plane, tmp_path, share, credential=LOCAL_ADMIN, settings=NO_AGENT)
    tested = re.search(r"Tested: (\d+)", said)
    assert tested
    assert int(tested[1]) >= 60  # no operation was passed over
    assert re.search(r"API Links: +[1-9]", said)  # what was made was used, changed and deleted


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("who", OTHERS)
async def test_whatever_machines_ask_is_answered_as_described(
    plane: Plane, tmp_path: Path, who: str, share: Share
) -> None:
    asked = [f"--include-operation-id={name}" for name in OTHERS[who]]
    credential = await secret_of(plane, who)
    await check(plane, tmp_path, share, *asked, credential=credential, settings="")


@pytest.mark.parametrize("share", SHARES)
async def test_a_stranger_is_told_nothing_whatever_is_asked(
    plane: Plane, tmp_path: Path, share: Share
) -> None:
    asked = [f"--exclude-operation-id={name}" for name in PUBLIC]
    checks = "--checks=positive_data_acceptance,negative_data_rejection,status_code_conformance"
    said = await check(
        plane, tmp_path, share, *asked, checks, credential=None, settings=ONLY_401
    )  # fmt: skip
    assert "Server error" not in said
