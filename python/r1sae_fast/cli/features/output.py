"""What the commands share: their arguments, and how what was found is printed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from r1sae_fast.features import FeatureDB
    from r1sae_fast.features.query import Frame
    from r1sae_fast.features.query.frame import ArrowFrame

Database = Annotated[Path, typer.Argument(help="The database file.", show_default=False)]
Feature = Annotated[int, typer.Argument(help="The feature's id.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Write a file instead: .parquet, .jsonl, .csv or .arrow."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")]
ShownContexts = Annotated[int, typer.Option("--n", "-n", help="Contexts, one a sequence.")]
ShownWindow = Annotated[int, typer.Option("--window", "-w", help="Tokens on either side.")]
ShownPerInterval = Annotated[
    int, typer.Option("--per-interval", help="Contexts from each interval of strengths.")
]


def open_database(path: Path) -> FeatureDB:
    from r1sae_fast.features import FeatureDB

    return FeatureDB.open(path)


def table_of(*columns: str, numbers: int = 0) -> Table:
    """A table whose first columns are ``numbers`` many of numbers."""
    from rich.table import Table
    from rich.text import Text

    from r1sae_fast.features.text import visible

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for i, column in enumerate(columns):
        number = i < numbers
        table.add_column(
            Text("\n".join(map(visible, column.split("\n")))),
            justify="right" if number else "left",
            no_wrap=number,
            overflow="fold",
        )
    return table


def frame_table(frame: Frame) -> Table:
    """The frame's rows; numbers to the right, and short.

    For a narrow terminal: long names break after each _, labels keep room, and who labelled stands
    with the label.
    """
    from rich.text import Text

    from r1sae_fast.features.show import label_text
    from r1sae_fast.features.text import visible

    names = [name for name in frame.columns if name != "model_name" or "label" not in frame.columns]
    table = table_of(*(n if len(n) < 10 else n.replace("_", "_\n") for n in names))
    table.padding = (0, 1, 0, 0)
    rows = frame.to_dicts()
    for column, name in zip(table.columns, names, strict=True):
        if any(isinstance(row[name], (int, float)) for row in rows):
            column.justify, column.no_wrap = "right", True
        elif name == "label":
            column.min_width = 14
    for row in rows:
        cells = []
        for name in names:
            value = row[name]
            if value is None:
                cells.append(Text("–", style="dim"))
            elif isinstance(value, float):
                cells.append(Text(f"{value:.4g}"))
            elif name == "label" and "model_name" in row:
                cells.append(label_text(value, row["model_name"]))
            else:
                cells.append(Text(visible(str(value))))
        table.add_row(*cells)
    return table


def given_out(frame: ArrowFrame, as_json: bool, out: Path | None, overwrite: bool) -> bool:
    """Whether the frame went into a file, or out as JSON."""
    if out is not None:
        frame.write(out, overwrite=overwrite)
        typer.echo(str(out))
    elif as_json:
        print_json(frame.to_arrow().to_pylist())
    return out is not None or as_json


def print_rich(what: Any) -> None:
    import sys

    from rich.console import Console

    # A pipe or a terminal may not know all of Unicode; a sign less is no reason to fail.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    Console(markup=False, highlight=False).print(what)


def print_json(rows: list[dict[str, Any]]) -> None:
    # ASCII, so that no control character reaches the terminal.
    for row in rows:
        typer.echo(json.dumps(row, default=str))
