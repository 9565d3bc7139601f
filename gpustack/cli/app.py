"""Every command, by name. A command's module is imported when it runs, and not for help."""

import importlib
import sys
from contextlib import suppress
from typing import Any

import click

from gpustack.cli.words import give_up, reason

#: Exit status after Ctrl-C, as shells have it: 128 + SIGINT.
INTERRUPTED = 130

#: name -> (where it is, what `gpustack --help` says of it).
COMMANDS = {
    "start": ("gpustack.cli.start:start", "Start a node: a server, or a worker that joins one."),
    "restart": ("gpustack.cli.start:restart", "Replace a running node; its engines go on."),
    "config": ("gpustack.cli.start:config", "Look at start options without starting."),
    "models": ("gpustack.cli.models:models", "List, deploy and delete models."),
    "instances": ("gpustack.cli.instances:instances", "List instances, read their logs."),
    "workers": ("gpustack.cli.workers:workers", "List workers."),
    "chat": ("gpustack.cli.chat:chat", "Talk to a model."),
    "api-keys": ("gpustack.cli.api_keys:api_keys", "Create API keys."),
    "version": ("gpustack.cli.version:version", "Say which version this is."),
}


class LazyGroup(click.Group):
    """The commands of `COMMANDS`; every failure but a bug is one sentence and status 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, meaning) for name, (_, meaning) in COMMANDS.items()])

    def main(self, *args: Any, **kwargs: Any) -> Any:
        sys.exit(self._status(*args, **kwargs))

    def _status(self, *args: Any, **kwargs: Any) -> int:
        try:
            # Not standalone: click would make 1 of Ctrl-C, and a traceback of our errors.
            result = super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.ClickException as error:
            error.show()
            return error.exit_code
        except click.Abort:
            return INTERRUPTED
        except Exception as error:
            if (words := reason(error)) is None:
                raise
            with suppress(OSError):
                click.echo(f"Error: {words}", err=True)
            give_up(sys.stdout)
            give_up(sys.stderr)
            return 1
        return result if isinstance(result, int) else 0


main = LazyGroup(
    help="Serve AI models on a cluster of GPUs.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
