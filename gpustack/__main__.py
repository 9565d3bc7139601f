"""`gpustack` and `python -m gpustack`."""

import sys

from gpustack import __version__


def main() -> None:
    """Run the command line. Asking for the version imports nothing else."""
    if sys.argv[1:] in (["version", "--short"], ["--version"]):
        sys.stdout.write(f"{__version__}\n")
        return
    from gpustack.cli.app import main as command  # after the check above

    command(prog_name="gpustack")


if __name__ == "__main__":
    main()
