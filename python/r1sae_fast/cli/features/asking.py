"""Commands that ask: top, search, find, firing, show, sql."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from r1sae_fast.cli.features.output import (
    Database,
    Feature,
    Json,
    Out,
    Overwrite,
    ShownContexts,
    ShownPerInterval,
    ShownWindow,
    frame_table,
    given_out,
    open_database,
    print_json,
    print_rich,
    table_of,
)

app = typer.Typer()


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

    with open_database(database) as db:
        found = db.top(feature, n, window)
    if as_json:
        print_json([example.to_dict() for example in found])
        return
    table = table_of("rank", "strength", "sequence", "token", "context", numbers=4)
    scale = found[0].strength if len(found) else 0.0
    for example in found:
        numbers = (example.rank, f"{example.strength:.4g}", example.sequence_id, example.token_idx)
        table.add_row(*map(str, numbers), heat(example, scale))
    print_rich(table if len(found) else f"feature {feature} is never active in this database")


@app.command()
def search(
    database: Database,
    text: Annotated[str, typer.Argument(help="Words of labels or tokens.", show_default=False)],
    n: Annotated[int, typer.Option("--n", "-n", help="At most so many features.")] = 20,
    semantic: Annotated[
        str | None,
        typer.Option(
            help="Search labels by meaning: folder of a model2vec model, or its name in the "
            "Hugging Face cache.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Find features by label, and by the tokens on which they fire; or by a label's meaning.

    --semantic needs the extra [search] and fetches nothing. It keeps the labels' vectors beside
    the database.
    """
    from rich.text import Text

    from r1sae_fast.features.labels import VERBS
    from r1sae_fast.features.show import label_text
    from r1sae_fast.features.text import visible

    with open_database(database) as db:
        hits = db.search(text, n, semantic=semantic)
        searched = db.searched
    if given_out(hits, as_json, out, overwrite):
        return
    table = table_of("feature", "active on", "score", "label", "found by", numbers=3)
    for hit in hits:
        found_by = "" if hit.matched == "token" else hit.matched
        if hit.token is not None and hit.token_offset is not None:
            found_by += ", " if found_by else ""
            found_by += f'{VERBS[hit.token_offset]} "{visible(hit.token)}"'
        label = Text() if hit.label is None else label_text(hit.label, hit.model_name)
        count = "" if hit.count is None else f"{hit.count:,}"
        table.add_row(str(hit.feature_id), count, f"{hit.score:.2f}", label, Text(found_by))
    searched = ("labels",) if semantic is not None else searched
    nothing = f"no feature found; {' and '.join(searched)} were searched"
    if "labels" not in searched:
        nothing += " (this file has no labels: no table autointerp)"
    print_rich(table if len(hits) else nothing)


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
    with open_database(database) as db:
        found = db.find(where, sort=sort.split(","), n=n, columns=names)
    if not given_out(found, as_json, out, overwrite):
        print_rich(frame_table(found) if len(found) else "no feature found")


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
    with open_database(database) as db:
        keys = sort.split(",")
        found = db.firing(text, sae, model, layer=layer, where=where, sort=keys, n=n, bos=bos)
    if not given_out(found, as_json, out, overwrite):
        print_rich(frame_table(found) if len(found) else "no feature fires")


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
    with open_database(database) as db:
        print_rich(db.show(feature, n, window, per_interval=per_interval))


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

    with open_database(database) as db:
        result = db.sql(query)
    if as_json:
        print_json(result.to_pylist())
        return
    table = table_of(*result.column_names)
    for row in result.slice(0, max(limit, 0)).to_pylist():
        table.add_row(*(Text(visible("NULL" if v is None else str(v))) for v in row.values()))
    print_rich(table)
    if result.num_rows > limit:
        print_rich(f"... {result.num_rows - limit:,} more rows (--limit)")
