"""``r1sae features``: build, query, show and export a database of features."""

import typer

from r1sae_fast.cli.features import asking, making

app = typer.Typer(
    no_args_is_help=True,
    help="Build, import, query, show and export a database of features (one DuckDB file).",
)
app.add_typer(making.app)
app.add_typer(asking.app)


def register(root: typer.Typer) -> None:
    """Adds the commands to the root app."""
    root.add_typer(app, name="features", rich_help_panel="The chain")
