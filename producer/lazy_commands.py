"""The command group. Worker commands are imported only when they run, and errors become one line and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click

from imagemill.shared.errors import ImagemillError, MissingExtra
from imagemill.shared.plain_text import harmless

GROUP = "imagemill.commands"
INTERRUPTED = 130

# Kept here so that `imagemill --help` does not import packages that a producer may not have.
SHORT_HELP = {
    "worker": "Run a worker node: one per GPU, or one for the CPU.",
    "models": "List, pull, add, verify, remove and quantise model files.",
    "tune": "Measure how large batches can be, and how fast they run.",
    "exporter": "Serve the whole installation's metrics to Prometheus.",
    "flower": "Run Flower, a web page that shows nodes and their shifts.",
    "doctor": "Find problems with Redis, S3, disk and GPU, and their fixes.",
}


class Commands(click.Group):
    """A group that adds the commands of the `imagemill.commands` entry points."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands, sorted."""
        return sorted({*super().list_commands(ctx), *(entry.name for entry in entry_points(group=GROUP))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command with this name; a command from an entry point is not imported yet."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            return command
        return next((LazyCommand(entry) for entry in entry_points(group=GROUP, name=cmd_name)), None)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. An ImagemillError prints `error (code): message` and exits; other exceptions propagate."""
        try:
            with explain_missing_packages(ctx):
                return super().invoke(ctx)
        except ImagemillError as error:
            click.secho(f"error ({error.code}): ", fg="red", nl=False, err=True)
            click.echo(harmless(error.message), err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)


class LazyCommand(click.Command):
    """A placeholder for an entry point's command, which is imported when it is called."""

    def __init__(self, entry: EntryPoint) -> None:
        super().__init__(entry.name, short_help=SHORT_HELP.get(entry.name, f"From {entry.value}."))
        self._entry = entry

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """The real command's context."""
        command: click.Command = self._entry.load()
        return command.make_context(info_name, args, parent, **extra)


@contextmanager
def explain_missing_packages(ctx: click.Context) -> Iterator[None]:
    """Turn the import of a package that is not installed into MissingExtra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "imagemill":
            raise  # a bug in imagemill, not a missing package
        extra = "flower" if ctx.invoked_subcommand == "flower" else "worker"
        raise MissingExtra(
            f"`imagemill {ctx.invoked_subcommand}` needs {error.name}, which is not installed: pip install 'imagemill[{extra}]'"
        ) from error
