"""PURE: llama-box's releases: which build is for a machine, and what the release says of it.

Source: the workflow that makes the releases (github.com/gpustack/llama-box,
.github/workflows/ci.yml): a zip for each build, called
`llama-box-<system>-<arch>-<toolkit>[-<version of the toolkit>].zip`, since v0.0.157 with `dl-`
before it for one that is linked dynamically, and `sha256sum.txt`, which sha256sum wrote.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gpustack.errors import Invalid, NotFound, Unavailable

#: The newest when this was written.
VERSION = "v0.0.171"
#: Where releases are, below the address of GitHub or of a mirror.
RELEASES = "gpustack/llama-box/releases/download"
SUMS = "sha256sum.txt"

SYSTEMS = ("linux", "darwin", "windows")
ARCHITECTURES = ("amd64", "arm64")
#: What a device is called -> the toolkits of its builds, the first that there is is taken.
TOOLKITS = {
    "cuda": ("cuda",),
    "npu": ("cann",), "cann": ("cann",),
    "rocm": ("hip",), "hip": ("hip",),
    "dcu": ("dtk",), "dtk": ("dtk",),
    "mps": ("metal",), "metal": ("metal",),
    "musa": ("musa",),
    "vulkan": ("vulkan",),
    "oneapi": ("oneapi",),
    # Static builds are named after the instructions that they need.
    "cpu": ("cpu", "avx2", "neon"),
}  # fmt: skip
_BUILD = re.compile(
    r"(?P<dynamic>dl-)?llama-box-(?P<system>[a-z]+)-(?P<arch>[a-z0-9]+)-(?P<toolkit>[a-z0-9]+)"
    r"(?:-(?P<version>[A-Za-z0-9.-]+))?\.zip"
)
_VERSION = re.compile(r"v\d{1,4}(?:\.\d{1,4}){2}(?:-?[A-Za-z0-9.]{1,16})?")


@dataclass(frozen=True)
class Machine:
    """What a build must fit.

    Attributes:
        device: a word of `TOOLKITS`; with a dash and a version it is that build and no other.
        runtime: the newest version of the toolkit that the machine's driver runs; None: unknown.
    """

    system: str
    arch: str
    device: str
    runtime: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Build:
    """A file of a release, and what the release says of its content."""

    version: str
    name: str
    sha256: str

    @property
    def path(self) -> str:
        return f"{self.version}/{self.name}"

    @property
    def system(self) -> str:
        return _parsed(self.name)["system"]

    @property
    def arch(self) -> str:
        return _parsed(self.name)["arch"]

    @property
    def program(self) -> str:
        """The name of the executable in it."""
        return "llama-box.exe" if self.system == "windows" else "llama-box"


def checked_version(text: str) -> str:
    """`text`, which is a release's name.

    Raises:
        Invalid: it is none.
    """
    if not _VERSION.fullmatch(text):
        raise Invalid(f"--version: want a release such as {VERSION}, got {text[:40]!r}")
    return text


def sums(text: str) -> dict[str, str]:
    """What sha256sum wrote: file -> SHA-256, hex.

    Raises:
        Unavailable: it is no such text.
    """
    found = {}
    for line in text.splitlines():
        digest, _, name = line.partition(" ")
        if not re.fullmatch(r"[0-9a-f]{64}", digest) or name[:1] not in (" ", "*"):
            raise Unavailable(f"want lines of `sha256sum`, got {line[:80]!r}")
        found[name[1:]] = digest
    return found


def choose(
    version: str, published: Mapping[str, str], machine: Machine, *, static: bool = False
) -> Build:
    """The build of a release for a machine.

    Dynamically linked ones come first; Windows gets the others, which are one file: links there
    need a privilege. Of several versions of a toolkit it is the newest that the driver runs; the
    oldest, which every driver runs, where that is unknown.

    Args:
        published: the release's files and their SHA-256.
        static: none that is linked dynamically.

    Raises:
        Invalid: the machine's device is no word that we know.
        NotFound: there is none; names those that there are.
    """
    word, _, wanted = machine.device.partition("-")
    if word not in TOOLKITS:
        raise Invalid(f"--device: want one of {', '.join(TOOLKITS)}, got {machine.device!r}")
    linkings = (None,) if static or machine.system == "windows" else ("dl-", None)
    for linking in linkings:
        for toolkit in TOOLKITS[word]:
            names = [
                name for name in published
                if (of := _parsed(name)) and of["dynamic"] == linking
                and (of["system"], of["arch"], of["toolkit"])
                == (machine.system, machine.arch, toolkit)
            ]  # fmt: skip
            if (name := _best(names, wanted, machine.runtime)) is not None:
                return Build(version, name, published[name])
    raise NotFound(
        f"llama-box {version} has no build for {machine.system} {machine.arch} with "
        f"{machine.device}{_driver(machine)}; there are: {_offered(published, machine)}"
    )


def _best(names: Iterable[str], wanted: str, runtime: tuple[int, ...] | None) -> str | None:
    versions = {name: _parsed(name)["version"] or "" for name in names}
    if wanted:
        return next((name for name, version in versions.items() if version == wanted), None)
    numbers = {name: _numbers(version) for name, version in versions.items()}
    fitting = [name for name, number in numbers.items() if runtime is None or number <= runtime]
    if not fitting:
        return None
    right = (min if runtime is None else max)(numbers[name] for name in fitting)
    # The shortest: others are for one chip of the device, such as cann-8.0-310p.
    return min((name for name in fitting if numbers[name] == right), key=len)


def _numbers(version: str) -> tuple[int, ...]:
    """12.8 -> (12, 8); 8.1.rc1-310p -> (8, 1)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _parsed(name: str) -> Mapping[str, str]:
    """The parts of a build's name; nothing where it is none."""
    found = _BUILD.fullmatch(name)
    return found.groupdict() if found else {}


def _driver(machine: Machine) -> str:
    if machine.runtime is None:
        return ""
    return f" (the driver runs up to {'.'.join(map(str, machine.runtime))})"


def _offered(published: Iterable[str], machine: Machine) -> str:
    found = [
        f"{of['toolkit']}-{of['version']}" if of["version"] else of["toolkit"]
        for of in map(_parsed, published)
        if of and (of["system"], of["arch"]) == (machine.system, machine.arch)
    ]
    return ", ".join(dict.fromkeys(found)) or "none for this system and architecture"
