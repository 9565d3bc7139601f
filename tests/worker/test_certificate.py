"""A worker's own certificate, and how it knows its server."""

import gc
import json
import logging
import ssl
from pathlib import Path

import pytest

from gpustack.lib import trust
from gpustack.lib.role import Leave
from gpustack.schemas.instances import InstanceState
from gpustack.schemas.wire import WORKER_CERTIFICATE_FILE
from gpustack.worker.certificate import OwnCertificate
from tests.support.certificate import Issued, issue
from tests.support.control_plane import ControlPlane, assigned, listening
from tests.support.ports import free_ports
from tests.support.worker_node import Node, eventually


def test_it_is_private_and_the_same_at_the_next_start(tmp_path: Path) -> None:
    first = OwnCertificate(tmp_path, "wörker")
    file = tmp_path / WORKER_CERTIFICATE_FILE
    assert file.stat().st_mode & 0o777 == 0o600
    assert "PRIVATE" not in first.pem
    assert OwnCertificate(tmp_path, "wörker").pem == first.pem
    assert not first.look()


@pytest.mark.parametrize("what", ["lost", "broken", "cut", "another's"])
def test_it_is_made_anew_when_it_is_of_no_use(tmp_path: Path, what: str) -> None:
    own, file = OwnCertificate(tmp_path, "one"), tmp_path / WORKER_CERTIFICATE_FILE
    before = own.pem
    match what:
        case "lost":
            file.unlink()
        case "broken":
            file.write_bytes(b"\xff nonsense")
        case "cut":
            file.write_text(file.read_text()[:-200])
        case "another's":
            OwnCertificate(tmp_path, "two")
    assert own.look()
    assert own.pem != before
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(file)  # the key is its
    assert file.read_text().endswith(own.pem)
    assert OwnCertificate(tmp_path, "one").pem == own.pem


async def test_the_server_is_told_of_it_and_of_a_new_one(node: Node, plane: ControlPlane) -> None:
    file = node.data_dir / WORKER_CERTIFICATE_FILE
    async with node.agent():
        await plane.until(lambda: plane.heartbeats)
        (registered,) = plane.registrations
        assert file.read_text().endswith(registered.certificate)
        trust.exactly(registered.certificate)
        file.unlink()
        await plane.until(lambda: plane.announcements)
        told = plane.announcements[-1]
        assert told.certificate != registered.certificate
        assert told.run_id == registered.run_id
        assert file.read_text().endswith(told.certificate)
    async with node.agent():
        await plane.until(lambda: len(plane.announcements) > 1)
    assert plane.announcements[-1].certificate == told.certificate


def speaking(issued: Issued) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.certfile, issued.keyfile)
    return context


# A handshake that is cancelled leaves its socket to the collector: httpcore closes it after errors.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_server_is_known_by_its_key_also_at_later_starts(
    node: Node, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    plane = node.plane = ControlPlane(free_ports(1))
    plane.url = node.flags["server_url"] = f"https://127.0.0.1:{plane.port}"
    issued, other = issue(tmp_path), issue(tmp_path, "other")
    fingerprint = trust.fingerprint(issued.der)
    node.flags["server_fingerprint"] = fingerprint
    async with listening(plane, speaking(issued)):
        async with node.agent():
            await plane.until(lambda: plane.heartbeats)
        known = json.loads((node.data_dir / "worker_credential").read_text())
        assert known["server_fingerprint"] == fingerprint
        del node.flags["server_fingerprint"]
        async with node.agent(leave=Leave.ORPHANED):
            await plane.until(lambda: plane.announcements)
            await plane.assign(assigned(1, node.spec()))
            await plane.until_state(1, InstanceState.RUNNING)
            engines = node.engines()
    assert engines
    announced = len(plane.announcements)
    said = f"its key has fingerprint {trust.fingerprint(other.der)}, not {fingerprint}"
    async with listening(plane, speaking(other)):
        async with node.agent(leave=Leave.ORPHANED):
            await eventually(lambda: said in caplog.text, limit_s=30)
        assert node.engines() == engines  # nothing that runs is stopped
        assert len(plane.announcements) == announced
        node.flags["server_fingerprint"] = trust.fingerprint(other.der)
        async with node.agent():
            await plane.until(lambda: len(plane.announcements) > announced)
    gc.collect()  # in no other test
