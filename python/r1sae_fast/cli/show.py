"""``r1sae show``: a feature, of the database at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from r1sae_fast.cli.features.asking import print_shown
from r1sae_fast.cli.features.output import Feature, ShownContexts, ShownPerInterval, ShownWindow

_VARIABLE = "R1SAE_DATABASE"
_USUAL = ("*.ddb", "run/*.ddb")


def show(
    feature: Feature,
    database: Annotated[
        Path | None,
        typer.Option(
            "--database",
            "-d",
            envvar=_VARIABLE,
            help="The database; default: the only .ddb file here or in run/.",
        ),
    ] = None,
    n: ShownContexts = 5,
    window: ShownWindow = 10,
    per_interval: ShownPerInterval = 2,
) -> None:
    """Show a feature in the terminal: statistics, labels, contexts in heat colours, neighbours."""
    print_shown(database or _only_database(), feature, n, window, per_interval)


def _only_database() -> Path:
    for pattern in _USUAL:
        found = sorted(Path().glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(map(str, found))
            raise ValueError(f"several databases are here ({names}); name one by --database")
    raise FileNotFoundError(
        f"no database here ({' or '.join(_USUAL)}); name one by --database or {_VARIABLE}"
    )


def register(app: typer.Typer) -> None:
    """Adds the command to the root app."""
    app.command(rich_help_panel="The chain")(show)
