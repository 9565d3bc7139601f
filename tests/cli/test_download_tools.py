"""`gpustack download-tools` as users run it, and a model that runs with what it installed."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from demo import tiny_gguf
from gpustack.hub.llama_box import VERSION
from gpustack.worker.detectors import host
from tests.cli.conftest import environment
from tests.support import fake_engine
from tests.support.fake_releases import FakeReleases, fake_releases, zipped
from tests.support.node import Node
from tests.support.proxy import recording_proxy

HERE = f"{host.os_name()}-{host.arch()}"
STATIC = f"llama-box-{HERE}-{ {'amd64': 'avx2'}.get(host.arch(), 'neon') }.zip"
Tools = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def releases() -> Iterator[FakeReleases]:
    program = f"#!{sys.executable} -IS\n"
    with fake_releases() as made:
        for version in (VERSION, "v0.0.155"):
            made.files[f"{version}/{STATIC}"] = zipped({"llama-box": f"{program}print('static')"})
        made.files[f"{VERSION}/dl-llama-box-{HERE}-cpu.zip"] = zipped(
            {"llama-box": program + fake_engine.SCRIPT, "libllama.so": "library"}
        )
        made.files[f"{VERSION}/llama-box-windows-amd64-avx2.zip"] = zipped({"llama-box.exe": "x"})
        yield made


@pytest.fixture
def tools(tmp_path: Path, releases: FakeReleases) -> Tools:
    def run(*words: str, status: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "gpustack", "download-tools", *words],
            env=environment(tmp_path / "data")
            | {"GPUSTACK_TOOLS_DOWNLOAD_BASE_URL": releases.url, **variables},
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == status, done.stderr
        return done

    return run


def test_a_release_is_installed_as_the_program_that_workers_look_for(
    tools: Tools, tmp_path: Path
) -> None:
    path = tmp_path / "data/bin" / f"llama-box_{VERSION}"
    assert str(path) in tools("--device", "cpu").stdout
    assert (path.resolve().parent / "libllama.so").exists()
    # Where users say so, and where a release has no other, it is the static build.
    tools("--device", "cpu", GPUSTACK_DISABLE_DYNAMIC_LINK_LLAMA_BOX="true")
    assert subprocess.run([path], capture_output=True, check=True).stdout == b"static\n"
    tools("--device", "cpu", "--version", "v0.0.155", "--bin-dir", str(tmp_path / "other"))
    assert (tmp_path / "other/llama-box_v0.0.155").is_file()


def test_a_build_is_found_for_this_machine_whatever_it_has(
    tools: Tools, releases: FakeReleases
) -> None:
    for toolkit in ("cuda-12.4", "hip-6.2", "cann-8.0", "metal", "musa-rc4.0", "dtk-25.04"):
        name = f"{VERSION}/dl-llama-box-{HERE}-{toolkit}.zip"
        releases.files[name] = zipped({"llama-box": "x", "libllama.so": "library"})
    assert "installed" in tools().stdout


def test_an_archive_goes_where_no_network_is(
    tools: Tools, releases: FakeReleases, tmp_path: Path
) -> None:
    archive = tmp_path / "tools.tar"
    tools("--device", "cpu", "--save-archive", str(archive), GPUSTACK_DATA_DIR="/proc/none")
    assert not (tmp_path / "data/bin").exists()
    asked = len(releases.asked)
    assert "installed" in tools("--load-archive", str(archive)).stdout
    assert len(releases.asked) == asked
    assert (tmp_path / "data/bin" / f"llama-box_{VERSION}").exists()
    # For a machine of another kind it is saved, and not installed.
    other = ("--system", "windows", "--arch", "amd64", "--device", "cpu")
    assert "--save-archive and carry it" in tools(*other, status=1).stderr
    tools(*other, "--save-archive", str(archive))
    done = tools("--load-archive", str(archive), status=1)
    assert "is for windows amd64, this machine is" in done.stderr


def test_tools_are_fetched_through_a_proxy(tools: Tools, releases: FakeReleases) -> None:
    port = int(releases.url.rpartition(":")[2])
    with recording_proxy() as proxy:
        proxy.routes["mirror.invalid"] = port
        tools(
            "--device", "cpu", "--tools-download-base-url", "http://mirror.invalid/",
            HTTP_PROXY=f"http://{proxy.at}", NO_PROXY="",
        )  # fmt: skip
        assert set(proxy.asked) == {"mirror.invalid:80"}


@pytest.mark.parametrize(
    ("words", "variables", "sentence"),
    [
        (["--version", "../../x"], {}, "--version: want a release such as v0.0.171"),
        (["--version", "v9.9.9"], {}, "there is no http://127.0.0.1:"),
        (["--device", "tpu"], {}, "--device: want one of cuda"),
        (["--device", "musa"], {}, "has no build for"),
        (["--system", "windows"], {}, "--device: say for which device"),
        (["--save-archive", "a", "--load-archive", "b"], {}, "give one of them"),
        (["--load-archive", "/nonexistent"], {}, "/nonexistent: No such file or directory"),
        (["--device", "cpu", "--save-archive", "/nonexistent/a"], {}, "/nonexistent"),
        (["--tools-download-base-url", "x"], {}, "want a URL"),
        (
            ["--device", "cpu"], {"GPUSTACK_DISABLE_DYNAMIC_LINK_LLAMA_BOX": "perhaps"},
            "environment variable GPUSTACK_DISABLE_DYNAMIC_LINK_LLAMA_BOX: want true or false",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(
    words: list[str], variables: dict[str, str], sentence: str, tools: Tools, tmp_path: Path
) -> None:
    done = tools(*words, status=1, **variables)
    assert sentence in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert not list(tmp_path.glob("data/bin/*"))


def test_a_model_of_that_backend_version_runs_with_it(tools: Tools, tmp_path: Path) -> None:
    tools("--device", "cpu")
    node = Node(tmp_path / "data").start()
    try:
        model = tiny_gguf.write(tmp_path / "m.gguf")
        node.deploy("m", model, backend="llama-box", backend_version=VERSION)
        (engine,) = node.engine_pids()
        variables = Path(f"/proc/{engine}/environ").read_text().split("\0")
        home = (node.data_dir / "bin" / f"llama-box_{VERSION}").resolve().parent
        (found,) = [one for one in variables if one.startswith("LD_LIBRARY_PATH=")]
        assert found.removeprefix("LD_LIBRARY_PATH=").split(":")[0] == str(home)
    finally:
        node.kill()
