"""A node with a certificate: HTTPS beside HTTP, and a new certificate without a cut."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gpustack.lib import trust
from tests.e2e.conftest import MakeNode
from tests.support.certificate import Issued, issue
from tests.support.node import Node
from tests.support.ports import free_ports
from tests.support.wait import soon

PASSWORD = "Given-pass-1"
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Issued:
    return issue(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module", params=["embedded", "disabled"])
def node(make_node: MakeNode, issued: Issued, request: pytest.FixtureRequest) -> Iterator[Node]:
    options = ("--gateway-mode", request.param, "--bootstrap-password", PASSWORD)
    started = make_node(*issued.options, *options).start()
    yield started
    with https(started, issued) as pooled:  # clients that keep a connection delay no stop
        assert pooled.get("/v2/models").status_code == 200
        began = time.monotonic()
        assert started.stop() == 0
        assert time.monotonic() - began < 15
    assert "did not end in time" not in started.log.read_text()


def https(node: Node, issued: Issued) -> httpx.Client:
    url = f"https://127.0.0.1:{node.tls_port}"
    return httpx.Client(base_url=url, verify=issued.trust(), trust_env=False)


def shown(node: Node, name: str | None) -> bytes:
    """The certificate that a client gets who asks for `name`."""
    anything = ssl.create_default_context()
    anything.check_hostname, anything.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", node.tls_port), timeout=10) as plain,
        anything.wrap_socket(plain, server_hostname=name) as connection,
    ):
        return connection.getpeercert(binary_form=True) or b""


def test_it_says_where_and_serves_both_ports(node: Node, issued: Issued) -> None:
    sentence = f"serving at {node.url} and https://127.0.0.1:{node.tls_port}"
    soon(lambda: sentence in node.log.read_text(), "it says where it serves")
    with https(node, issued) as safe, node.http(None) as plain:
        for way in (safe, plain):
            assert way.get("/v2/models").status_code == 200
            assert way.get("/v1/models").json()["data"] == []


def test_a_session_opened_over_https_never_travels_without(node: Node, issued: Issued) -> None:
    form = {"username": "admin", "password": PASSWORD}
    with https(node, issued) as safe, node.http(None) as plain:
        cookie = safe.post("/auth/login", data=form).headers["set-cookie"]
        assert "; Secure" in cookie
        assert "; Secure" not in plain.post("/auth/login", data=form).headers["set-cookie"]
        # What a client says of its scheme counts for nothing.
        lied = plain.post("/auth/login", data=form, headers={"X-GPUStack-Scheme": "https"})
        assert "; Secure" not in lied.headers["set-cookie"]
        assert safe.get("/v2/users/me").json()["username"] == "admin"


def test_commands_believe_the_server_whose_key_they_were_told(node: Node, issued: Issued) -> None:
    def listed(*words: str) -> subprocess.CompletedProcess[str]:
        url = f"https://127.0.0.1:{node.tls_port}"
        clean = {name: said for name, said in os.environ.items() if name != "GPUSTACK_DATA_DIR"}
        return subprocess.run(
            [sys.executable, "-m", "gpustack", "models", "list", "--server-url", url, *words],
            env=clean | {"GPUSTACK_API_KEY": node.api_key()},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    said = listed("--server-fingerprint", trust.fingerprint(issued.der))
    assert (said.returncode, said.stderr) == (0, "")
    refused = listed()
    assert refused.returncode == 1
    assert "give the authority's certificate as --server-ca" in refused.stderr
    assert "Traceback" not in refused.stderr


async def test_a_new_certificate_is_taken_at_a_hangup_and_a_broken_one_is_not(
    node: Node, issued: Issued, models: Path, tmp_path: Path
) -> None:
    threads = ["--threads=1", "--threads-batch=1"]
    node.deploy("slow", models / "slow.gguf", backend_parameters=threads)
    assert node.process is not None
    log = node.log.read_text
    body = {"model": "slow", "max_tokens": 300, "stream": True, "messages": MESSAGES}
    async with (
        httpx.AsyncClient(verify=issued.trust(), trust_env=False, timeout=60) as safe,
        safe.stream(
            "POST", f"https://127.0.0.1:{node.tls_port}/v1/chat/completions", json=body
        ) as answer,
    ):
        lines = answer.aiter_lines()
        assert (await anext(lines)).startswith("data: ")
        issued.replace_by(issue(tmp_path, "renewed"))
        node.process.send_signal(signal.SIGHUP)
        for name in (None, "localhost"):
            what = "new connections are shown the new certificate"
            soon(lambda name=name: shown(node, name) == issued.der, what)  # type: ignore[misc]
        good = issued.keyfile.read_bytes()
        issued.keyfile.write_bytes(issue(tmp_path, "other").keyfile.read_bytes())
        refused = gpustack(node, "reload-config")
        assert refused.stderr.startswith("Error: nothing was changed: --ssl-certfile")
        assert "the key is not the certificate's" in refused.stderr
        assert "not reloaded: --ssl-certfile" in log()
        rest = [line async for line in lines if line]
        assert len(rest) > 200  # it was not over before
        assert rest[-1] == "data: [DONE]"
    assert shown(node, None) == issued.der
    refused = gpustack(node, "restart")
    assert "the key is not the certificate's" in refused.stderr
    issued.keyfile.write_bytes(good)
    assert gpustack(node, "restart").returncode == 0
    assert shown(node, None) == issued.der
    assert "Traceback" not in log()


def test_a_crash_beside_a_broken_certificate_costs_https_alone(node: Node, issued: Issued) -> None:
    good = issued.keyfile.read_bytes()
    issued.keyfile.write_bytes(b"-----BEGIN")
    for role in ("gateway", "server+gateway"):
        for pid in node.pids(role):
            os.kill(pid, signal.SIGKILL)
    soon(lambda: "no HTTPS until this is mended: --ssl-certfile" in node.log.read_text(), "said")

    def serves() -> bool:
        with node.http(None) as plain:
            try:
                return plain.get("/readyz").status_code == 200
            except httpx.TransportError:
                return False

    soon(serves, "HTTP is served", within_s=20)
    issued.keyfile.write_bytes(good)
    assert gpustack(node, "reload-config").stdout == "in effect: nothing new\n"
    with https(node, issued) as safe:
        assert safe.get("/v2/models").status_code == 200


def gpustack(node: Node, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpustack", command, "--data-dir", str(node.data_dir)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_what_cannot_be_served_is_an_error_at_once(
    make_node: MakeNode, issued: Issued, tmp_path: Path
) -> None:
    other = issue(tmp_path, "another")
    wrong = make_node("--ssl-certfile", str(issued.certfile), "--ssl-keyfile", str(other.keyfile))
    assert wrong.start(wait=False).process is not None
    with socket.socket() as taken:
        held = free_ports(1)  # an ephemeral one may lie in a range that is an option's
        taken.bind(("0.0.0.0", held))
        taken.listen()
        late = make_node(*issued.options, "--tls-port", str(held)).start(wait=False)
        for node, why in (
            (wrong, "the key is not the certificate's"),
            (late, f"--tls-port {held} is taken by another program"),
        ):
            assert node.process is not None
            assert node.process.wait(20) == 1
            assert why in node.log.read_text()
            assert "Traceback" not in node.log.read_text()


@pytest.mark.parametrize("mode", ["embedded", "disabled"])
def test_one_port_alone_speaks_https_where_both_options_name_it(
    make_node: MakeNode, issued: Issued, mode: str
) -> None:
    """As with --port 443, which is what --tls-port is by default."""
    node = make_node(*issued.options, "--gateway-mode", mode)
    place = node.arguments.index("--port") + 1
    node.arguments[place] = str(node.tls_port)
    node.start()
    sentence = f"serving at https://127.0.0.1:{node.tls_port}\n"
    soon(lambda: sentence in node.log.read_text(), "it says where it serves")
    with https(node, issued) as safe:
        assert safe.get("/v2/models").status_code == 200
        plain = f"http://127.0.0.1:{node.tls_port}/healthz"
        with pytest.raises(httpx.HTTPError):
            httpx.get(plain, trust_env=False)

        def joined() -> bool:
            items = safe.get("/v2/workers").json()["items"]
            return [one["state"] for one in items] == ["ready"]

        soon(joined, "its own worker is there")
    listed = subprocess.run(
        [sys.executable, "-m", "gpustack", "workers", "list", "--data-dir", str(node.data_dir)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "ready" in listed.stdout
