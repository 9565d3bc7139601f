"""Which way traffic goes when the environment names a proxy: Hubs through it, our own never."""

import subprocess
import sys
from pathlib import Path

from tests.cli.conftest import environment
from tests.e2e.conftest import MakeNode
from tests.support.fake_hub import fake_hub
from tests.support.proxy import recording_proxy


def test_a_hub_is_asked_through_the_proxy_and_no_part_of_the_cluster_is(
    make_node: MakeNode, models: Path
) -> None:
    with recording_proxy() as proxy, fake_hub() as hub:
        hub.repos["org/tiny"] = {"tiny.gguf": (models / "chat.gguf").read_bytes()}
        hub.gated.add("org/tiny")
        proxy.routes["hub.invalid"] = int(hub.url.rpartition(":")[2])
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        variables = {
            **dict.fromkeys([*names, *map(str.lower, names)], f"http://{proxy.at}"),
            "NO_PROXY": "", "no_proxy": "",
            "HF_ENDPOINT": "http://hub.invalid", "HF_TOKEN": hub.token,
        }  # fmt: skip

        def gpustack(*words: str) -> str:
            done = subprocess.run(
                [sys.executable, "-m", "gpustack", *words],
                env=environment(server.data_dir) | variables,
                capture_output=True, text=True, check=False, timeout=60,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return done.stdout

        # The worker is a node of its own, so that every part has to call another.
        server = make_node("--disable-worker")
        server.environment |= variables
        server.start()
        worker = make_node(name="worker", server=server)
        worker.environment |= variables
        worker.start()
        gpustack("models", "deploy", "tiny", "org/tiny:tiny.gguf", "--wait")
        assert gpustack("chat", "tiny", "hello", "--max-tokens", "5").strip()
        (instance,) = server.instances(1)
        assert gpustack("instances", "logs", instance["name"], "--tail", "1").strip()
        for node in (worker, server):
            assert node.stop() == 0
        assert set(proxy.asked) == {"hub.invalid:80"}
        assert set(hub.tokens) == {f"Bearer {hub.token}"}
