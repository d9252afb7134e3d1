"""The help and the errors of the commands: options in groups, examples, whole sentences, and what was meant."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import click

HELP = {"help_option_names": ["-h", "--help"]}


class Command(click.Command):
    """A command whose help has examples, and whose options are in groups.

    examples: lines for a shell. groups: the names of parameters, by the title of their group; the others are in a last
    one. meant: options of other programs, with what to write here.
    """

    def __init__(
        self,
        *arguments: Any,
        examples: Sequence[str] = (),
        groups: Mapping[str, Sequence[str]] | None = None,
        meant: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **{"context_settings": HELP, **options})
        self.examples = examples
        self.groups = groups or {}
        self.meant = meant or {}

    def get_short_help_str(self, limit: int = 0) -> str:
        """Return the first sentence of the description, whole."""
        return super().get_short_help_str(10_000)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the description, and the examples below it."""
        super().format_help_text(ctx, formatter)
        if self.examples:
            with formatter.section("Examples" if len(self.examples) > 1 else "Example"):
                for line in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, group by group."""
        records = {
            str(parameter.name): record
            for parameter in self.get_params(ctx)
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)) is not None
        }
        for title, names in self.groups.items():
            with formatter.section(title):
                formatter.write_dl([records.pop(name) for name in names])
        with formatter.section("Options"):
            formatter.write_dl([*records.values()])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments. Raises `click.UsageError`, which says what to write instead if that is known."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as exc:
            if (instead := self.meant.get(exc.option_name)) is None:
                raise
            raise click.UsageError(f"No such option '{exc.option_name}': write {instead}", ctx) from exc


class Group(click.Group):
    """A group of such commands. For an unknown command that is the name of a file, it says how to serve that."""

    command_class = Command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command. Raises `click.UsageError`."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as exc:
            if args[0] in ("help", "version"):
                raise click.UsageError(f"No such command '{args[0]}'. Write: downloadview --{args[0]}", ctx) from exc
            if os.path.exists(args[0]):
                option = "--config " if args[0].endswith(".toml") else ""
                raise click.UsageError(f"{exc.message} To serve it: downloadview serve {option}{args[0]}", ctx) from exc
            raise
