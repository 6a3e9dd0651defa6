"""The `sixfold` command. Subcommands are imported when they are called, so that help is instant."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from .. import __version__

COMMANDS = {
    "serve": (".commands.serve", "Serve a model over an OpenAI-compatible HTTP API."),
    "chat": (".commands.chat", "Talk to a model in the terminal."),
    "generate": (".commands.generate", "Complete one prompt on standard output."),
    "bench": (".commands.bench", "Measure the speed of any OpenAI-compatible server."),
    "check": (".commands.check", "Run every kernel of a platform against its contract."),
    "verify": (".commands.verify", "Kernels, answers and speed here, as one report to send."),
    "doctor": (".doctor", "Show what this machine can run, and what is missing for the rest."),
}
"""Name -> (module that holds the click command of that name, its line in the help)."""


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(COMMANDS[cmd_name][0], __package__)
        command = getattr(module, cmd_name)
        return command if isinstance(command, click.Command) else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sixfold")
def sixfold() -> None:
    """An LLM serving engine where the same command works on any hardware."""


def main() -> None:
    """Entry point: every SixfoldError becomes one sentence and exit code 1."""
    from ..common.errors import ConfigError, SixfoldError

    try:
        code = sixfold.main(standalone_mode=False, prog_name="sixfold")
    except click.exceptions.Abort:
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except SixfoldError as error:
        click.echo(f"Error: {error}", err=True)
        code = 2 if isinstance(error, ConfigError) else 1
    sys.exit(code if isinstance(code, int) else 0)
