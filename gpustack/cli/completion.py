"""`gpustack completion`: the script with which a shell completes our commands."""

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")
#: The variable through which a shell's script asks; click's name for a program called gpustack.
VARIABLE = "_GPUSTACK_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that makes SHELL complete commands, options and choices.

    \b
    bash:  eval "$(gpustack completion bash)", in ~/.bashrc
    zsh:   eval "$(gpustack completion zsh)", in ~/.zshrc, after compinit
    fish:  gpustack completion fish > ~/.config/fish/completions/gpustack.fish
    """
    script = get_completion_class(shell)
    if script is None:
        raise click.UsageError(f"this version of click completes nothing for {shell}")
    command = context.find_root().command
    click.echo(script(command, {}, "gpustack", VARIABLE).source())
