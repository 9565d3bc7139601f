"""`gpustack version`."""

import platform

import click

from gpustack import __version__


@click.command()
@click.option("--short", is_flag=True, help="The number alone.")
def version(short: bool) -> None:
    """Say which version this is."""
    if short:
        click.echo(__version__)
    else:
        machine = f"{platform.system()} {platform.machine()}"
        click.echo(f"gpustack {__version__} (Python {platform.python_version()}, {machine})")
