"""The node as a service: what is written for each manager, and how each is told."""

import configparser
import os
import plistlib
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import pytest

from gpustack.cli import service_files
from gpustack.cli.launcher import STOP_S, STOP_STEPS
from gpustack.cli.service import put
from gpustack.cli.service_files import MARK, STOP_TIMEOUT_S, Places, Service
from gpustack.cli.service_managers import Launchd, Systemd, WinSW, manager
from gpustack.config.load import load, to_json
from gpustack.errors import Conflict, Forbidden, GPUStackError, Unavailable
from gpustack.gateway.life import STOP_LIMIT_S
from tests.cli.conftest import environment

EXAMPLES = Path(__file__).parents[1] / "config" / "examples"
ODD = '/srv/a b/100%/$HOME/"q"/back\\slash/é'
Program = Callable[..., Path]


def node(platform: str, *, for_user: bool = False, config: str = "/etc/gpustack/s.yaml") -> Service:
    return Service(
        command=(sys.executable, "-m", "gpustack", "start", "--config-file", config),
        reload=(sys.executable, "-m", "gpustack", "reload-config", "--data-dir", ODD),
        environment={"PATH": "/usr/bin:/odd %h/$x", "HF_ENDPOINT": "https://mirror.example"},
        places=service_files.places(platform, {"HOME": "/home/me"}, for_user=for_user),
        for_user=for_user,
    )


@pytest.mark.parametrize("for_user", [False, True])
def test_the_unit_of_systemd_is_one_that_it_takes(tmp_path: Path, for_user: bool) -> None:
    text = service_files.systemd_unit(node("linux", for_user=for_user))
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(text)
    said = dict(unit["Service"])
    for key, value in {
        "Type": "notify", "KillMode": "process", "OOMPolicy": "continue", "Restart": "on-failure",
    }.items():  # fmt: skip
        assert said[key] == value
    assert said["ExecStart"].endswith("-m gpustack start --config-file /etc/gpustack/s.yaml")
    assert "reload-config" in said["ExecReload"]
    assert int(said["LimitNOFILE"]) > 65536
    assert ("network-online.target" in unit["Unit"].get("After", "")) is not for_user
    place = tmp_path / "gpustack.service"
    place.write_text(text, encoding="utf-8")
    if (analyze := shutil.which("systemd-analyze")) is not None:
        whose = "--user" if for_user else "--system"
        done = subprocess.run(
            [analyze, "verify", whose, "--man=no", "--recursive-errors=no", str(place)],
            capture_output=True, text=True, check=False, timeout=60,
            env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        )  # fmt: skip
        assert "gpustack.service" not in done.stderr
        assert done.returncode == 0, done.stderr


def test_words_mean_themselves_to_systemd() -> None:
    text = service_files.systemd_unit(node("linux", config=ODD))
    (start,) = (line for line in text.splitlines() if line.startswith("ExecStart="))
    word = shlex.split(start.removeprefix("ExecStart="))[-1]  # it quotes as a shell does here
    assert word.replace("%%", "%").replace("$$", "$") == ODD
    assert 'Environment="PATH=/usr/bin:/odd %%h/$x"' in text


def test_a_stop_has_more_time_than_the_launcher_takes() -> None:
    longest = sum(max(STOP_S[name] for name in names) for names, _ in STOP_STEPS)
    assert longest < STOP_TIMEOUT_S
    for name in ("gateway", "relay", "server+gateway"):  # they send their last figures as well
        assert STOP_S[name] >= STOP_LIMIT_S + 5


def test_the_job_of_launchd_keeps_a_failed_node_running_and_lets_it_stop_in_peace() -> None:
    text = service_files.launchd_plist(node("darwin"))
    assert MARK in text
    job = plistlib.loads(text.encode())
    assert job["Label"] == "ai.gpustack"
    assert job["ProgramArguments"][1:4] == ["-m", "gpustack", "start"]
    assert job["KeepAlive"] == {"SuccessfulExit": False}
    assert job["ExitTimeOut"] == STOP_TIMEOUT_S
    assert job["AbandonProcessGroup"] is True
    assert job["EnvironmentVariables"]["PATH"] == "/usr/bin:/odd %h/$x"
    assert job["StandardErrorPath"] == "/Library/Logs/gpustack.log"


def test_the_service_of_windows_says_the_same_to_winsw() -> None:
    text = service_files.winsw_xml(node("win32", config='C:\\a "b" & c.yaml'))
    assert MARK in text
    root = ElementTree.fromstring(text)  # noqa: S314
    assert root.tag == "service"
    assert root.findtext("executable") == sys.executable
    assert [word.text for word in root.findall("argument")] == [
        "-m", "gpustack", "start", "--config-file", 'C:\\a "b" & c.yaml',
    ]  # fmt: skip
    assert root.findtext("stoptimeout") == f"{STOP_TIMEOUT_S} sec"
    found = root.find("onfailure")
    assert found is not None
    assert found.attrib == {"action": "restart", "delay": "5 sec"}
    assert [one.attrib["name"] for one in root.findall("env")] == ["PATH", "HF_ENDPOINT"]


@pytest.mark.parametrize(
    ("platform", "for_user", "unit", "config"),
    [
        ("linux", False, "/etc/systemd/system/gpustack.service", "/etc/gpustack/service.yaml"),
        ("linux", True, "/x/systemd/user/gpustack.service", "/x/gpustack/service.yaml"),
        ("darwin", False, "/Library/LaunchDaemons/ai.gpustack.plist", "/etc/gpustack/service.yaml"),
        ("darwin", True, "/h/Library/LaunchAgents/ai.gpustack.plist", "/x/gpustack/service.yaml"),
        (
            "win32",
            False,
            "D:\\PD\\gpustack\\gpustack-service.xml",
            "D:\\PD\\gpustack\\service.yaml",
        ),
    ],
)
def test_files_are_where_each_manager_looks(
    platform: str, for_user: bool, unit: str, config: str
) -> None:
    variables = {"HOME": "/h", "XDG_CONFIG_HOME": "/x", "PROGRAMDATA": "D:\\PD"}
    found = service_files.places(platform, variables, for_user=for_user)
    assert (str(found.unit), str(found.config)) == (unit, config)


def test_a_service_takes_along_what_its_shell_had_but_no_password() -> None:
    given = {
        "PATH": "/opt/python@3/bin", "HF_ENDPOINT": "https://hub", "NO_PROXY": "a,b",
        "HTTPS_PROXY": "http://me:secret@proxy:1", "http_proxy": "me:secret@proxy",
        "GPUSTACK_PORT": "1", "HOME": "/h", "ALL_PROXY": "",
    }  # fmt: skip
    taken, left_out = service_files.passed_on(given)
    assert taken.keys() == {"PATH", "HF_ENDPOINT", "NO_PROXY"}
    assert left_out == ["HTTPS_PROXY", "http_proxy"]


@pytest.mark.parametrize("name", ["v0.6.yaml", "v0.7.yaml", "v2.0.yaml"])
def test_the_config_file_of_the_service_means_what_was_given(tmp_path: Path, name: str) -> None:
    text = (EXAMPLES / name).read_text().replace(":port/", ":5432/")
    for place in ("data_dir", "cache_dir", "log_dir", "keyfile", "certfile"):
        if place.endswith("file"):
            (tmp_path / place).touch()
        text = text.replace(f"/path/to/{place}", str(tmp_path / place))
    first, second = tmp_path / "given.yaml", tmp_path / "service.yaml"
    first.write_text(text)
    loaded = load({"config_file": str(first), "service_port_range": "41000-41009"}, {})
    second.write_text(service_files.config_text(loaded))
    again = load({"config_file": str(second)}, {})
    assert to_json(again.settings) == to_json(loaded.settings) | {"config_file": str(second)}
    assert again.settings.token is not None
    assert again.settings.token.reveal() in second.read_text()


def test_only_the_owner_reads_the_config_file_and_what_is_there_stays(tmp_path: Path) -> None:
    unit, config = tmp_path / "a/unit", tmp_path / "b/config"
    files = {unit: f"# {MARK}\n1", config: f"# {MARK}\n2"}
    put(files, private=config)
    put(files, private=config)  # the same again is no mistake
    assert [stat.S_IMODE(path.stat().st_mode) for path in (unit, config)] == [0o644, 0o600]
    with pytest.raises(Conflict, match=r"config is there with another content.*uninstall"):
        put({config: "new", unit: "new"}, private=config)
    unit.unlink()
    config.write_text("another's")
    with pytest.raises(Conflict, match=r"config is there with another content.*not gpustack's"):
        put(files, private=config)
    assert not unit.exists()


def gpustack(
    *words: str, status: int = 0, home: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "gpustack", "service", *words],
        env=environment(home / "data") | {"XDG_CONFIG_HOME": str(home), "HOME": str(home)}
        | variables,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert done.returncode == status, done.stderr
    return done


def test_a_dry_run_shows_all_but_secrets_and_writes_nothing(tmp_path: Path) -> None:
    done = gpustack(
        "install", "--user", "--dry-run", "--port", "8123", "--token", "t0ken-of-mine",
        home=tmp_path, HF_TOKEN="hf_secret", HTTP_PROXY="http://u:pass-word@proxy:1",
    )  # fmt: skip
    assert "port: 8123\n" in done.stdout
    assert "token: (hidden)" in done.stdout
    assert f"start --config-file {tmp_path}/gpustack/service.yaml\n" in done.stdout
    for secret in ("t0ken-of-mine", "hf_secret", "pass-word"):
        assert secret not in done.stdout + done.stderr
    assert f"HTTP_PROXY holds a password, which no unit may: set it in {tmp_path}" in done.stderr
    assert not list(tmp_path.rglob("*.service"))
    assert not list(tmp_path.rglob("*.yaml"))


def test_a_config_file_and_nothing_else_is_the_services_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"data_dir: {tmp_path / 'data'}\nport: 8123\n")
    words = ("install", "--user", "--dry-run", "--config-file", str(file))
    done = gpustack(*words, home=tmp_path, GPUSTACK_DATA_DIR="")
    assert f"--config-file {file}\n" in done.stdout
    assert "service.yaml" not in done.stdout
    more = gpustack(*words, "--debug", home=tmp_path, GPUSTACK_DATA_DIR="")
    assert "service.yaml" in more.stdout
    assert "port: 8123\n" in more.stdout


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    for command in ("status", "uninstall"):
        done = gpustack(command, "--user", home=tmp_path, status=1)
        assert "gpustack is not installed as a service: " in done.stderr
        assert len(done.stderr.splitlines()) == 1
    bad = gpustack("install", "--user", "--port", "0", home=tmp_path, status=1)
    assert "option --port: want a port" in bad.stderr
    if sys.platform == "linux":
        unit = tmp_path / "systemd/user/gpustack.service"
        unit.parent.mkdir(parents=True)
        unit.write_text("[Service]\n")
        done = gpustack("uninstall", "--user", home=tmp_path, status=1)
        assert "is another program's" in done.stderr


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Put a program on PATH that writes down its arguments, prints and ends as told."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, *, prints: str = "", status: int = 0) -> Path:
        heard = tmp_path / f"{name}.heard"
        path = folder / name
        path.write_text(
            f"#!{sys.executable}\nimport sys\n"
            f"open({str(heard)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
            f"print({prints!r}, file=sys.stderr if {status} else sys.stdout)\nsys.exit({status})\n"
        )
        path.chmod(0o755)
        heard.write_text("")
        return heard

    return make


def test_systemd_is_told_in_its_own_words(tmp_path: Path, program: Program) -> None:
    heard = program(
        "systemctl",
        prints="ActiveState=active\nSubState=running\nMainPID=7\nStatusText=serving at http://x",
    )
    unit = Path("/etc/systemd/system/gpustack.service")
    system = Systemd(for_user=False, is_root=True, booted=tmp_path)
    system.check()
    system.enable(unit)
    said = system.status(unit)
    system.disable(unit)
    assert said.is_running
    assert said.text == "active (running), pid 7: serving at http://x"
    lines = heard.read_text().splitlines()
    name = "gpustack.service"
    assert lines[:3] == ["daemon-reload", f"enable {name}", f"start {name}"]
    assert lines[-1] == f"disable --now {name}"
    Systemd(for_user=True, is_root=False, booted=tmp_path).forget()
    assert heard.read_text().splitlines()[-1] == "--user daemon-reload"


def test_what_systemd_refuses_is_one_sentence(tmp_path: Path, program: Program) -> None:
    program("systemctl", prints="Failed to enable unit.\nSee the log.", status=1)
    with pytest.raises(Unavailable, match=r"`systemctl daemon-reload` failed: Failed to enable"):
        Systemd(for_user=False, is_root=True, booted=tmp_path).enable(Path("gpustack.service"))
    with pytest.raises(Unavailable, match="systemd does not run this machine"):
        Systemd(for_user=False, is_root=True, booted=tmp_path / "none").check()
    with pytest.raises(Forbidden, match="use sudo, or give --user"):
        Systemd(for_user=False, is_root=False, booted=tmp_path).check()
    Systemd(for_user=True, is_root=False, booted=tmp_path).check()


def test_launchd_is_told_in_its_own_words(program: Program) -> None:
    heard = program(
        "launchctl",
        prints="ai.gpustack = {\n\tstate = running\n\tpid = 7\n\tx = {\n\t\tstate = y\n\t}\n}",
    )
    unit = Path("/x/ai.gpustack.plist")
    agent = Launchd(for_user=True, is_root=False, uid=501)
    agent.check()
    assert agent.status(unit).text == "running, pid 7"
    agent.disable(unit)
    assert heard.read_text().splitlines()[-1] == "bootout gui/501/ai.gpustack"
    heard = program("launchctl", prints="Could not find service", status=113)
    assert not agent.status(unit).is_running
    with pytest.raises(GPUStackError, match="Could not find service"):
        agent.enable(unit)
    with pytest.raises(Forbidden, match="use sudo"):
        Launchd(for_user=False, is_root=False, uid=501).check()


def test_winsw_stands_beside_its_unit(tmp_path: Path, program: Program) -> None:
    with pytest.raises(Unavailable, match=r"put its program into a folder of PATH as winsw\.exe"):
        WinSW().check()
    heard = program("winsw", prints="Active (running)")
    unit = tmp_path / "gpustack-service.xml"
    WinSW().check()
    WinSW().enable(unit)
    assert WinSW().status(unit).is_running
    WinSW().disable(unit)
    assert heard.read_text().split() == ["install", "start", "status", "stop", "uninstall"]
    assert not unit.with_suffix(".exe").exists()
    with pytest.raises(Unavailable, match="leave out --user"):
        manager("win32", for_user=True)


def test_a_manager_that_nobody_knows_is_said_so() -> None:
    with pytest.raises(Unavailable, match="no service manager of sunos5"):
        manager("sunos5", for_user=False)
    assert Places(PurePosixPath("/u"), PurePosixPath("/c")).log is None
