"""Every command, by name. A command's module is imported when it runs, and not for help."""

import importlib
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from gpustack.cli.words import give_up, reason

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

#: Exit status after Ctrl-C, as shells have it: 128 + SIGINT.
INTERRUPTED = 130

#: name -> (where it is, what `gpustack --help` says of it).
COMMANDS = {
    "start": ("gpustack.cli.start:start", "Start a node: a server, or a worker that joins one."),
    "restart": ("gpustack.cli.start:restart", "Replace a running node; its engines go on."),
    "reload-config": (
        "gpustack.cli.reload_config:reload_config",
        "Have a running node take in new settings.",
    ),
    "service": (
        "gpustack.cli.service:service",
        "Have this machine's service manager run the node.",
    ),
    "config": ("gpustack.cli.config:config", "Look at start options without starting."),
    "models": ("gpustack.cli.models:models", "List, deploy, roll back, grant and delete models."),
    "apply": ("gpustack.cli.apply:apply", "Bring the cluster to what a file says."),
    "diff": ("gpustack.cli.apply:diff", "Show what apply would change."),
    "export": ("gpustack.cli.apply:export", "Write what the cluster should be to a file."),
    "instances": ("gpustack.cli.instances:instances", "List instances, read their logs."),
    "workers": ("gpustack.cli.workers:workers", "List workers, label them."),
    "token": ("gpustack.cli.token:token", "Let workers join: make tokens, rotate the cluster's."),
    "chat": ("gpustack.cli.chat:chat", "Talk to a model."),
    "groups": ("gpustack.cli.groups:groups", "Groups of users, to whom models are granted."),
    "api-keys": ("gpustack.cli.api_keys:api_keys", "Create API keys."),
    "events": ("gpustack.cli.events:events", "List what happened, why and by whom."),
    "audit": ("gpustack.cli.audit:audit", "List who changed what, check that record."),
    "db": ("gpustack.cli.db:db", "Back the database up, restore it."),
    "reset-admin-password": (
        "gpustack.cli.reset_admin_password:reset_admin_password",
        "Give user admin a new password.",
    ),
    "download-tools": (
        "gpustack.cli.download_tools:download_tools",
        "Install llama-box, or carry it to where no network is.",
    ),
    "completion": ("gpustack.cli.completion:completion", "Have a shell complete commands."),
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

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem]":
        from click.shell_completion import CompletionItem

        names = [
            CompletionItem(name, help=meaning)
            for name, (_, meaning) in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return names + click.Command.shell_complete(self, ctx, incomplete)  # our own options

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
