"""``r1sae features``: build, query, show and export a database of features."""

from __future__ import annotations

import io
import json
from enum import Enum
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

app = typer.Typer(
    no_args_is_help=True,
    help="Build, import, query, show and export a database of features (one DuckDB file).",
)


@app.command()
def build(
    codes: Annotated[Path, typer.Argument(help="Folder of code shards.", show_default=False)],
    database: Database,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="tokenizer.json, or a folder that has one; without it tokens are ids."),
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(help="What r1sae examples wrote for these codes; else collected now."),
    ] = None,
    sae: Annotated[
        str | None,
        typer.Option(help="The SAE of the codes, for its checksum and each feature's neighbours."),
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Examples of each feature to keep.")] = 20,
    max_memory: Annotated[
        str, typer.Option(help="How much memory may be used, such as 2GiB or 700MB.")
    ] = "2GiB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Build a database from code shards, with statistics and a counted label for each feature.

    The file is there whole or not at all. A build that is stopped leaves what was there before.
    One that was killed goes on where it was when run again; ctrl-c clears up.
    """
    from r1sae_fast.examples import Examples
    from r1sae_fast.features import FeatureDB
    from r1sae_fast.r1.stream.sizes import parse_size
    from r1sae_fast.sae import FastSAE

    decode = None if tokenizer is None else _load_tokenizer(tokenizer)
    ready = None if examples is None else Examples.load(examples)
    with FeatureDB.build(
        database,
        codes,
        ready,
        decode,
        sae=None if sae is None else FastSAE.from_pretrained(sae),
        n=n,
        max_memory=parse_size(max_memory),
        overwrite=overwrite,
    ) as db:
        rows = int(db.metadata["rows"])
        alive = db.sql("SELECT count(*) AS n FROM features WHERE count > 0").to_pylist()[0]["n"]
        size = database.stat().st_size / 1e6
        typer.echo(
            f"{database}: {rows:,} tokens, {alive:,} of {db.d_sae:,} features alive, {size:.1f} MB"
        )


@app.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            help="A released database: math.ddb, logic.ddb or a sample of these, or the folder "
            "with the SQLite files of the first release.",
            show_default=False,
        ),
    ],
    destination: Annotated[Path, typer.Argument(help="The file to write.", show_default=False)],
    labels: Annotated[
        Path | None,
        typer.Option(help="The file of labels; default: autointerp.db or .csv beside the source."),
    ] = None,
    max_memory: Annotated[
        str, typer.Option(help="How much memory may be used, such as 2GiB or 700MB.")
    ] = "2GiB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Sort a released database by feature: any feature is then one short read.

    The file is there whole or not at all. An import that is stopped leaves what was there before,
    and starts anew when run again.
    """
    from r1sae_fast.features import import_database
    from r1sae_fast.r1.stream.sizes import parse_size, show_size

    done = import_database(
        source, destination, labels, max_memory=parse_size(max_memory), overwrite=overwrite
    )
    typer.echo(
        f"{destination}: {done.tokens:,} tokens, {done.activations:,} activations of "
        f"{done.features:,} features, {done.labels:,} labels, "
        f"{show_size(destination.stat().st_size)}"
    )


@app.command()
def top(
    database: Database,
    feature: Feature,
    n: Annotated[int, typer.Option("--n", "-n", help="How many.")] = 10,
    window: Annotated[int, typer.Option("--window", "-w", help="Tokens on either side.")] = 5,
    as_json: Json = False,
) -> None:
    """List a feature's strongest examples, with their context."""
    from r1sae_fast.features.show import heat

    with _open(database) as db:
        found = db.top(feature, n, window)
    if as_json:
        _print_json([example.to_dict() for example in found])
        return
    table = _table("rank", "strength", "sequence", "token", "context", numbers=4)
    scale = found[0].strength if len(found) else 0.0
    for example in found:
        numbers = (example.rank, f"{example.strength:.4g}", example.sequence_id, example.token_idx)
        table.add_row(*map(str, numbers), heat(example, scale))
    _print(table if len(found) else f"feature {feature} is never active in this database")


@app.command()
def search(
    database: Database,
    text: Annotated[str, typer.Argument(help="Words of labels or tokens.", show_default=False)],
    n: Annotated[int, typer.Option("--n", "-n", help="At most so many features.")] = 20,
    as_json: Json = False,
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Find features by label, and by the tokens on which they fire."""
    from rich.text import Text

    from r1sae_fast.features.labels import VERBS
    from r1sae_fast.features.show import label_text
    from r1sae_fast.features.text import visible

    with _open(database) as db:
        hits = db.search(text, n)
        searched = db.searched
    if _given_out(hits, as_json, out, overwrite):
        return
    table = _table("feature", "active on", "score", "label", "found by", numbers=3)
    for hit in hits:
        found_by = "label" if hit.matched == "label" else ""
        if hit.token is not None and hit.token_offset is not None:
            found_by += ", " if found_by else ""
            found_by += f'{VERBS[hit.token_offset]} "{visible(hit.token)}"'
        label = Text() if hit.label is None else label_text(hit.label, hit.model_name)
        count = "" if hit.count is None else f"{hit.count:,}"
        table.add_row(str(hit.feature_id), count, f"{hit.score:.2f}", label, Text(found_by))
    nothing = f"no feature found; {' and '.join(searched)} were searched"
    if "labels" not in searched:
        nothing += " (this file has no labels: no table autointerp)"
    _print(table if len(hits) else nothing)


@app.command()
def find(
    database: Database,
    where: Annotated[
        str | None,
        typer.Argument(
            help="A condition, such as 'density < 1e-3 and thinking_density > 5 * prompt_density'; "
            "without it all features.",
            show_default=False,
        ),
    ] = None,
    sort: Annotated[
        str, typer.Option("--sort", "-s", help="Columns, by commas; -density: largest first.")
    ] = "feature_id",
    n: Annotated[int, typer.Option("--n", "-n", help="At most so many features.")] = 20,
    columns: Annotated[
        str | None, typer.Option(help="Which columns, by commas; a wrong one lists all.")
    ] = None,
    as_json: Json = False,
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Find features by their statistics: density by segment, strengths, labels and their scores.

    A condition has Python's arithmetic and comparisons, and, or, not, in ('wait' in label), and
    abs, sqrt, log, log2, log10, min, max, known(column).
    """
    names = None if columns is None else [name.strip() for name in columns.split(",")]
    with _open(database) as db:
        found = db.find(where, sort=sort.split(","), n=n, columns=names)
    if not _given_out(found, as_json, out, overwrite):
        _print(_frame_table(found) if len(found) else "no feature found")


@app.command()
def firing(
    database: Database,
    text: Annotated[str, typer.Argument(help="The text to be read.", show_default=False)],
    sae: Annotated[Path, typer.Option(help="The SAE's folder.", show_default=False)],
    model: Annotated[
        str, typer.Option(help="A checkpoint folder; tiny-r1 is the shipped model.")
    ] = "tiny-r1",
    layer: Annotated[
        int | None, typer.Option(help="Default: the database's.", show_default=False)
    ] = None,
    where: Annotated[
        str | None, typer.Option(help="A condition, as of find.", show_default=False)
    ] = None,
    sort: Annotated[str, typer.Option("--sort", "-s", help="Columns, by commas.")] = "-relative",
    n: Annotated[int, typer.Option("--n", "-n", help="At most so many features.")] = 20,
    bos: Annotated[bool, typer.Option("--bos", help="Count the token that begins texts.")] = False,
    as_json: Json = False,
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Find features that fire on a text: runs the model and the SAE.

    strength: the largest in the text; relative: to the feature's largest in the database; tokens:
    how many of the text's it is active on; token, segment: where it is strongest.
    """
    with _open(database) as db:
        keys = sort.split(",")
        found = db.firing(text, sae, model, layer=layer, where=where, sort=keys, n=n, bos=bos)
    if not _given_out(found, as_json, out, overwrite):
        _print(_frame_table(found) if len(found) else "no feature fires")


@app.command()
def show(
    database: Database,
    feature: Feature,
    n: ShownContexts = 5,
    window: ShownWindow = 10,
    per_interval: ShownPerInterval = 2,
) -> None:
    """Show a feature: statistics, labels, and contexts highlighted by strength."""
    print_shown(database, feature, n, window, per_interval)


def print_shown(database: Path, feature: int, n: int, window: int, per_interval: int) -> None:
    """Prints a feature's picture."""
    with _open(database) as db:
        _print(db.show(feature, n, window, per_interval=per_interval))


class Formats(str, Enum):
    """What an export is for."""

    parquet = "parquet"
    jsonl = "jsonl"
    neuronpedia = "neuronpedia"
    saedashboard = "saedashboard"


@app.command()
def export(
    database: Database,
    folder: Annotated[Path, typer.Argument(help="Folder to write to.", show_default=False)],
    to: Annotated[
        Formats,
        typer.Option(
            help="parquet: each table; jsonl: a feature a line; neuronpedia: its import in bulk; "
            "saedashboard: its batches."
        ),
    ] = Formats.parquet,
    features: Annotated[
        str | None,
        typer.Option(help="Which, such as 3,7 (not with parquet).", show_default="all"),
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Strongest examples of each.")] = 20,
    window: Annotated[int, typer.Option("--window", "-w", help="Tokens on either side.")] = 32,
    model_id: Annotated[
        str | None, typer.Option(help="The model's name on Neuronpedia.", show_default=False)
    ] = None,
    source_set: Annotated[str, typer.Option(help="The SAE's name there.")] = "r1sae-fast",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files there.")] = False,
) -> None:
    """Write each table as a parquet file, or features for the pages of others."""
    with _open(database) as db:
        if to is Formats.parquet:
            files = db.export(folder, overwrite=overwrite)
        else:
            chosen = None if features is None else _integers(features)
            files = db.export_pages(
                folder,
                to.value,
                chosen,
                n=n,
                window=window,
                model_id=model_id,
                source_set=source_set,
                overwrite=overwrite,
            )
    for file in files:
        typer.echo(str(file))


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--features is {text!r}; expected ids by commas, such as 3,7") from None


@app.command()
def sql(
    database: Database,
    query: Annotated[str, typer.Argument(help="Any query that reads.", show_default=False)],
    limit: Annotated[int, typer.Option(help="Show at most so many rows (as a table).")] = 50,
    as_json: Json = False,
) -> None:
    """Run a query; tables are listed by: SHOW TABLES."""
    from rich.text import Text

    from r1sae_fast.features.text import visible

    with _open(database) as db:
        result = db.sql(query)
    if as_json:
        _print_json(result.to_pylist())
        return
    table = _table(*result.column_names)
    for row in result.slice(0, max(limit, 0)).to_pylist():
        table.add_row(*(Text(visible("NULL" if v is None else str(v))) for v in row.values()))
    _print(table)
    if result.num_rows > limit:
        _print(f"... {result.num_rows - limit:,} more rows (--limit)")


def _open(path: Path) -> FeatureDB:
    from r1sae_fast.features import FeatureDB

    return FeatureDB.open(path)


def _load_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; expected a tokenizer.json")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001  # the library raises bare Exception
        raise ValueError(f"{file}: not a tokenizer.json ({error})") from None


def _table(*columns: str, numbers: int = 0) -> Table:
    """A table whose first columns are ``numbers`` many of numbers."""
    from rich.table import Table
    from rich.text import Text

    from r1sae_fast.features.text import visible

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for i, column in enumerate(columns):
        number = i < numbers
        table.add_column(
            Text(visible(column)),
            justify="right" if number else "left",
            no_wrap=number,
            overflow="fold",
        )
    return table


def _frame_table(frame: Frame, shown: int | None = None) -> Table:
    """The frame's rows; numbers to the right, and short."""
    from rich.text import Text

    from r1sae_fast.features.text import visible

    table = _table(*frame.columns)
    rows = frame.to_dicts()[:shown]
    for column, name in zip(table.columns, frame.columns, strict=True):
        if any(isinstance(row[name], (int, float)) for row in rows):
            column.justify, column.no_wrap = "right", True
    for row in rows:
        cells = []
        for value in row.values():
            if value is None:
                cells.append(Text("–", style="dim"))
            elif isinstance(value, float):
                cells.append(Text(f"{value:.4g}"))
            else:
                cells.append(Text(visible(str(value))))
        table.add_row(*cells)
    return table


def _given_out(frame: ArrowFrame, as_json: bool, out: Path | None, overwrite: bool) -> bool:
    """Whether the frame went into a file, or out as JSON."""
    if out is not None:
        frame.write(out, overwrite=overwrite)
        typer.echo(str(out))
    elif as_json:
        _print_json(frame.to_arrow().to_pylist())
    return out is not None or as_json


def _print(what: Any) -> None:
    import sys

    from rich.console import Console

    # A pipe or a terminal may not know all of Unicode; a sign less is no reason to fail.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    Console(markup=False, highlight=False).print(what)


def _print_json(rows: list[dict[str, Any]]) -> None:
    # ASCII, so that no control character reaches the terminal.
    for row in rows:
        typer.echo(json.dumps(row, default=str))


def register(root: typer.Typer) -> None:
    """Adds the commands to the root app."""
    root.add_typer(app, name="features", rich_help_panel="The chain")
