"""`gpustack download-tools`: the programs of others that engines are run with."""

import asyncio
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from gpustack.cli.start import loaded_from
from gpustack.config.values import parse
from gpustack.errors import Invalid, SettingsError
from gpustack.hub import llama_box
from gpustack.hub.llama_box import Build, Machine

if TYPE_CHECKING:
    from gpustack.config.options import Settings

STATIC = "GPUSTACK_DISABLE_DYNAMIC_LINK_LLAMA_BOX"


@click.command("download-tools")
@click.option("--version", "version", help="Release of llama-box.", metavar="VERSION")
@click.option("--system", type=click.Choice(llama_box.SYSTEMS), help="If not this machine's.")
@click.option("--arch", type=click.Choice(llama_box.ARCHITECTURES), help="If not this machine's.")
@click.option(
    "--device",
    metavar="DEVICE",
    help=f"One of {', '.join(llama_box.TOOLKITS)}; cuda-12.8 means that build and no other.",
)
@click.option("--tools-download-base-url", metavar="URL", help="Mirror of github.com.")
@click.option("--save-archive", metavar="FILE", help="Write FILE instead of installing.")
@click.option("--load-archive", metavar="FILE", help="Install from FILE, without a network.")
@click.option("--bin-dir", metavar="DIR", help="Where to install.")
@click.option("--data-dir", metavar="DIR", help="Of the node; tools are in bin below it.")
@click.option("--config-file", metavar="FILE", help="YAML file that the node is started with.")
def download_tools(
    version: str | None,
    system: str | None,
    arch: str | None,
    device: str | None,
    save_archive: str | None,
    load_archive: str | None,
    **given: str | None,
) -> None:
    """Install llama-box's release build for this machine.

    Models run with it when their backend version names it. Without a network: have
    --save-archive write a file where there is one, carry it over, and give it to --load-archive.
    """
    if save_archive and load_archive:
        raise Invalid("--save-archive and --load-archive: give one of them")
    facts = {key: value for key, value in given.items() if value is not None}
    if load_archive:
        _install_from(Path(load_archive), _settings(facts))
        return
    if save_archive:
        # Nothing is installed: the node's own folders may be out of reach.
        facts["data_dir"] = str(Path(save_archive).absolute().parent)
    settings = _settings(facts)
    machine = _machine(system, arch, device)
    from gpustack.hub import tools  # httpx: not for help

    with tempfile.TemporaryFile() as archive:
        build = asyncio.run(_fetched(settings, version, machine, archive))
        if save_archive:
            tools.save(archive, build, Path(save_archive))
            click.echo(f"saved: {save_archive}")
        else:
            _install(archive, build, settings)


def _settings(given: dict[str, Any]) -> "Settings":
    return loaded_from(given).settings


async def _fetched(
    settings: "Settings", version: str | None, machine: Machine, archive: BinaryIO
) -> Build:
    """The build that fits; its zip is in `archive`, checked."""
    from gpustack.hub.tools import UPSTREAM, Releases

    release = llama_box.checked_version(version or llama_box.VERSION)
    async with Releases(settings.tools_download_base_url or UPSTREAM) as releases:
        published = await releases.published(release)
        build = llama_box.choose(release, published, machine, static=_wants_static())
        click.echo(f"fetching {build.name} of llama-box {release}", err=True)
        await releases.fetch(build, archive, _show)
        _show(None)
    return build


def _install_from(path: Path, settings: "Settings") -> None:
    from gpustack.hub import tools

    with tools.load(path) as (build, archive):
        _install(archive, build, settings)


def _install(archive: BinaryIO, build: Build, settings: "Settings") -> None:
    from gpustack.hub import tools

    here = _machine(None, None, "cpu")
    if (build.system, build.arch) != (here.system, here.arch):
        raise Invalid(
            f"{build.name} is for {build.system} {build.arch}, this machine is {here.system} "
            f"{here.arch}: use --save-archive and carry it there"
        )
    path = tools.install(archive, build, settings.bin_dir)
    click.echo(f"installed: {path}; for models with backend version {build.version}")


def _show(have: int | None) -> None:
    """Tell who looks on how much is there; None: all of it."""
    if sys.stderr.isatty():
        click.echo("" if have is None else f"\r{have >> 20} MiB", err=True, nl=have is None)


def _wants_static() -> bool:
    if not (said := os.environ.get(STATIC)):
        return False
    try:
        return bool(parse("bool", said))
    except ValueError as error:
        raise SettingsError(f"environment variable {STATIC}: {error}") from None


def _machine(system: str | None, arch: str | None, device: str | None) -> Machine:
    """This machine, as far as nothing else is said."""
    from gpustack.worker.detectors import host

    system, arch = system or host.os_name(), arch or host.arch()
    if device is not None:
        return Machine(system, arch, device)
    if (system, arch) != (host.os_name(), host.arch()):
        raise Invalid("--device: say for which device, since the build is for another machine")
    found = _device(system)
    return Machine(system, arch, found, _cuda_version() if found == "cuda" else None)


def _device(system: str) -> str:
    """What this machine's drivers drive."""
    if system == "darwin":
        return "mps"
    if system == "windows":
        return "cuda" if shutil.which("nvidia-smi") else "cpu"
    drivers = {
        "/dev/nvidiactl": "cuda",
        "/dev/davinci_manager": "npu",
        "/dev/mtgpu.0": "musa",
        "/dev/mkfd": "dcu",
        "/dev/kfd": "rocm",
    }
    return next((device for path, device in drivers.items() if Path(path).exists()), "cpu")


def _cuda_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs; None: it does not say."""
    import ctypes

    number = ctypes.c_int()
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        failed = driver.cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return None if failed else (number.value // 1000, number.value % 1000 // 10)
