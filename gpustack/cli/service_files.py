"""PURE: what is written for each system's service manager so that it runs a node.

Sources: systemd.service(5), systemd.exec(5), systemd.kill(5) and systemd.syntax(7);
launchd.plist(5); WinSW's documents (github.com/winsw/winsw, docs/xml-config-file.md).
"""

import plistlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from xml.etree import ElementTree

from gpustack.config.load import Loaded, to_json
from gpustack.config.options import options
from gpustack.config.values import setting_shown
from gpustack.errors import Invalid

NAME = "gpustack"
LABEL = "ai.gpustack"
DESCRIPTION = "GPUStack: serves AI models on a cluster of GPUs"
#: Stands in every file of ours; another program's are never overwritten nor removed.
MARK = "Written by `gpustack service install`."
#: Seconds that a node may take to stop. Above the launcher's own time-outs, which are in order;
#: what a manager kills after its own leaves engines behind.
STOP_TIMEOUT_S = 120
#: Seconds until a node is expected to serve: a new version may have a large database to migrate.
START_TIMEOUT_S = 900
#: Seconds before a node that has failed is started again.
RESTART_S = 5
#: A stream is two descriptors in a gateway. The most that Linux allows without further settings.
OPEN_FILES = 1_048_576
#: macOS has a limit for all processes together.
MACOS_OPEN_FILES = 65_536
#: Variables that tell a node more than its options do: a service has them from its installation.
PASSED_ON = (
    "PATH", "LD_LIBRARY_PATH", "HF_ENDPOINT", "GPUSTACK_DISABLE_DYNAMIC_LINK_LLAMA_BOX",
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
    "http_proxy", "https_proxy", "all_proxy", "no_proxy",
)  # fmt: skip
#: In a URL, with its scheme or without.
_PASSWORD = re.compile(r"(?:^|://)[^/]*@")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Service:
    """A node as a service.

    Attributes:
        command: starts the node, and becomes it.
        reload: has the running node take in its settings.
        environment: variables beside those of the manager; no secrets.
        for_user: of one user instead of the machine.
    """

    command: tuple[str, ...]
    reload: tuple[str, ...]
    environment: Mapping[str, str]
    places: "Places"
    for_user: bool


@dataclass(frozen=True)
class Places:
    """Where the files of a service are.

    Attributes:
        log: where output goes; None: to the manager's journal.
        variables: more variables, the administrator's own; None: this manager reads none.
    """

    unit: PurePath
    config: PurePath
    log: PurePath | None = None
    variables: PurePath | None = None


def places(platform: str, environment: Mapping[str, str], *, for_user: bool) -> Places:
    """Where a service manager looks, and where its node's settings are.

    Args:
        platform: as `sys.platform` has it.
        environment: of whoever installs: tells where a user's files are.
    """
    if platform == "win32":
        folder = PureWindowsPath(environment.get("PROGRAMDATA", "C:\\ProgramData")) / NAME
        return Places(folder / "gpustack-service.xml", folder / "service.yaml", log=folder / "log")
    home = PurePosixPath(environment.get("HOME") or "/")
    own = PurePosixPath(environment.get("XDG_CONFIG_HOME") or home / ".config")
    config = (own if for_user else PurePosixPath("/etc")) / NAME / "service.yaml"
    if platform == "darwin":
        kind = "LaunchAgents" if for_user else "LaunchDaemons"
        library = (home if for_user else PurePosixPath("/")) / "Library"
        unit = library / kind / f"{LABEL}.plist"
        return Places(unit, config, log=library / "Logs/gpustack.log")
    if for_user:
        variables = config.with_name("environment")
        return Places(own / f"systemd/user/{NAME}.service", config, variables=variables)
    # The existing product's service has its variables there as well.
    variables = PurePosixPath("/etc/default") / NAME
    return Places(PurePosixPath("/etc/systemd/system") / f"{NAME}.service", config, None, variables)


def passed_on(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The variables that a service takes along, and the names of those that hold a password."""
    found = {name: environment[name] for name in PASSED_ON if environment.get(name)}
    secret = [n for n, value in found.items() if "PATH" not in n and _PASSWORD.search(value)]
    return {name: value for name, value in found.items() if name not in secret}, secret


def others(places: Places) -> list[PurePath]:
    """What a manager reads beside the unit and gpustack never writes."""
    if places.variables is None:
        return []
    return [places.unit.with_name(f"{places.unit.name}.d"), places.variables]


def config_text(loaded: Loaded, *, shown: bool = False) -> str:
    """The config file that stands for all that was given, secrets among it.

    The data directory is always named: its default may be another for the service's user.

    Args:
        shown: as anybody may see it, without the secrets.
    """
    import yaml  # not for help

    every = to_json(loaded.settings)
    if shown:
        every |= {
            known.key: setting_shown(known, getattr(loaded.settings, known.key))
            for known in options()
        }
    given = {"data_dir", *loaded.origins} - {"config_file"}
    lines = {key: value for key, value in every.items() if key in given}
    return f"# {MARK}\n{yaml.safe_dump(lines, sort_keys=False, allow_unicode=True)}"


def unit_text(platform: str, service: Service) -> str:
    """What the service manager of `platform` (as `sys.platform` has it) reads.

    Raises:
        Invalid: a word of it has a control character, which would say something else there.
    """
    places = service.places
    for word in (
        *service.command, *service.reload, *service.environment.values(),
        *map(str, (places.unit, places.config, places.log, places.variables)),
    ):  # fmt: skip
        if _CONTROL.search(word):
            raise Invalid(f"a service cannot have a control character: {word!a}")
    if platform == "win32":
        return winsw_xml(service)
    return launchd_plist(service) if platform == "darwin" else systemd_unit(service)


def systemd_unit(service: Service) -> str:
    variables = "".join(
        f"Environment={_quoted(f'{name}={value}')}\n" for name, value in service.environment.items()
    )
    if service.places.variables:  # not quoted, whatever is in it
        variables += f"EnvironmentFile=-{service.places.variables}\n".replace("%", "%%")
    wanted = "Wants=network-online.target\nAfter=network-online.target\n"
    return f"""\
# {MARK}
[Unit]
Description={DESCRIPTION}
{"" if service.for_user else wanted}
[Service]
Type=notify
ExecStart={_command(service.command)}
ExecReload={_command(service.reload)}
WorkingDirectory=/
{variables}
# Engines outlive a launcher that crashed, and its successor adopts them; a stop ends them itself.
KillMode=process
TimeoutStopSec={STOP_TIMEOUT_S}
TimeoutStartSec={START_TIMEOUT_S}
# An engine that took too much memory is the agent's to restart.
OOMPolicy=continue
Restart=on-failure
RestartSec={RESTART_S}
LimitNOFILE={OPEN_FILES}
TasksMax=infinity

[Install]
WantedBy={"default" if service.for_user else "multi-user"}.target
"""


def _command(words: tuple[str, ...]) -> str:
    # In the program's own name a dollar sign means itself.
    first, *others = words
    return " ".join([_quoted(first), *(_quoted(word).replace("$", "$$") for word in others)])


def _quoted(word: str) -> str:
    """`word` as systemd reads one word: quoted as in C, and no specifier in it."""
    word = word.replace("%", "%%")
    if re.fullmatch(r"[\w@:,./+=%$-]+", word):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def launchd_plist(service: Service) -> str:
    limits = {"NumberOfFiles": MACOS_OPEN_FILES}
    job = {
        "Label": LABEL,
        "ProgramArguments": list(service.command),
        "EnvironmentVariables": dict(service.environment),
        "WorkingDirectory": "/",
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": RESTART_S,
        "ExitTimeOut": STOP_TIMEOUT_S,
        # Engines outlive a launcher that crashed.
        "AbandonProcessGroup": True,
        # Otherwise macOS slows down what no window belongs to.
        "ProcessType": "Interactive",
        "SoftResourceLimits": limits,
        "HardResourceLimits": limits,
        "StandardOutPath": str(service.places.log),
        "StandardErrorPath": str(service.places.log),
    }
    text = plistlib.dumps(job, sort_keys=False).decode()
    return text.replace("<plist", f"<!-- {MARK} -->\n<plist", 1)


def winsw_xml(service: Service) -> str:
    root = ElementTree.Element("service")
    root.append(ElementTree.Comment(f" {MARK} "))

    def add(tag: str, text: str | None = None, **attributes: str) -> ElementTree.Element:
        element = ElementTree.SubElement(root, tag, attributes)
        element.text = text
        return element

    add("id", NAME)
    add("name", "GPUStack")
    add("description", DESCRIPTION)
    for name, value in service.environment.items():
        add("env", name=name, value=value)
    add("executable", service.command[0])
    for word in service.command[1:]:
        add("argument", word)
    add("startmode", "Automatic")
    add("delayedAutoStart", "true")  # after the network
    add("stoptimeout", f"{STOP_TIMEOUT_S} sec")
    add("onfailure", action="restart", delay=f"{RESTART_S} sec")
    add("resetfailure", "1 hour")
    add("logpath", str(service.places.log))
    log = add("log", mode="roll-by-size")
    ElementTree.SubElement(log, "sizeThreshold").text = "10240"
    ElementTree.SubElement(log, "keepFiles").text = "8"
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False) + "\n"
