"""The command group: errors become one line and an exit code, and some commands are loaded when they are called."""

from __future__ import annotations

from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Any

import click

from imagemill.shared.errors import ImagemillError, MissingExtra

GROUP = "imagemill.commands"
INTERRUPTED = 130

# Said here, so that `imagemill --help` need not import what a producer may not have.
SHORT_HELP = {
    "worker": "Run a worker node: one per GPU, or one for the CPU.",
    "models": "List, pull, verify and quantise the models' files.",
    "tune": "Find out how many images fit on a device at a time, and how fast they are.",
    "doctor": "Say what is wrong with Redis, S3, disk and GPU, and how to mend it.",
}


class Commands(click.Group):
    """A group whose further commands come from the entry points `imagemill.commands`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands, sorted."""
        return sorted({*super().list_commands(ctx), *(entry.name for entry in entry_points(group=GROUP))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command by its name; one from an entry point is not loaded yet."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            return command
        return next((Later(entry) for entry in entry_points(group=GROUP, name=cmd_name)), None)

    def invoke(self, ctx: click.Context) -> Any:
        """Run, and turn an ImagemillError into `error (code): sentence`; other exceptions pass."""
        try:
            return super().invoke(ctx)
        except ImagemillError as error:
            click.secho(f"error ({error.code}): ", fg="red", nl=False, err=True)
            click.echo(error.message, err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)


class Later(click.Command):
    """Stands for a command of an entry point until it is called."""

    def __init__(self, entry: EntryPoint) -> None:
        super().__init__(entry.name, short_help=SHORT_HELP.get(entry.name, f"From {entry.value}."))
        self._entry = entry

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """The context of the real command; MissingExtra where a module that it needs isn't installed."""
        return self._load().make_context(info_name, args, parent, **extra)

    def _load(self) -> click.Command:
        try:
            command: click.Command = self._entry.load()
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == "imagemill":
                raise  # a fault in imagemill, not in how it was installed
            raise MissingExtra(
                f"`imagemill {self.name}` needs {error.name}, which isn't installed: pip install 'imagemill[worker]'"
            ) from error
        return command


def installed_version() -> str:
    """The version of the installed distribution."""
    try:
        return version("imagemill")
    except PackageNotFoundError:
        return "unknown (not installed)"
