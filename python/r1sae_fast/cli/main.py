"""The entry point of ``r1sae``: lists the commands. One module a command, each with ``register``.

To add a command: write ``cli/<name>.py`` with a typer function and ``register(app)``, import it
here and add it to :data:`COMMANDS` in the order in which ``r1sae --help`` shall show it. The
command is named as its module.
"""

from typing import Annotated, Any

import typer

from r1sae_fast.cli import (
    calibrate,
    convert,
    curves,
    demo,
    encode,
    examples,
    features,
    fetch,
    harvest,
    info,
    inspect,
    label,
    plan,
    show,
    tiny_r1,
    train,
)
from r1sae_fast.cli import eval as evaluate
from r1sae_fast.cli.guard import TRACEBACK, GuardedGroup

COMMANDS = [
    demo,
    plan,
    harvest,
    train,
    curves,
    calibrate,
    evaluate,
    encode,
    examples,
    features,
    label,
    show,
    fetch,
    tiny_r1,
    inspect,
    convert,
    info,
]


class RootGroup(GuardedGroup):
    """Lists commands and groups of commands in the order of :data:`COMMANDS`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the help page's order."""
        return [module.__name__.rpartition(".")[2].replace("_", "-") for module in COMMANDS]


app = typer.Typer(
    name="r1sae",
    cls=RootGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from r1sae_fast import __version__

        typer.echo(f"r1sae {__version__}")
        raise typer.Exit


@app.callback()
def root(
    traceback: Annotated[
        bool,
        typer.Option(
            "--traceback",
            help="Show the whole traceback of an error instead of its one line "
            f"(as does {TRACEBACK}=1).",
        ),
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Sparse autoencoders on DeepSeek-R1: from a reasoning trace to a database of features.

    The way of the data: [cyan]harvest[/] the residual stream of a model into shards, [cyan]train[/]
    an SAE on them, [cyan]encode[/] them to sparse codes, collect each feature's strongest
    [cyan]examples[/] in one pass, and build and query a database of [cyan]features[/].
    [cyan]r1sae demo[/] runs all of it on the small R1 that ships with the package.
    """


for _command in COMMANDS:
    _command.register(app)


def main() -> None:
    """Runs the command line (the ``r1sae`` script)."""
    app(prog_name="r1sae")


if __name__ == "__main__":
    main()
