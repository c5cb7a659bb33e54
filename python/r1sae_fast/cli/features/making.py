"""Commands that write files: build, import, export."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from r1sae_fast.cli.features.output import Database, open_database

app = typer.Typer()


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

    The file is there whole or not at all. An import that is stopped leaves what was there before.
    One that was killed goes on where it was when run again; ctrl-c clears up.
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


class Formats(str, Enum):
    """What an export is for."""

    parquet = "parquet"
    jsonl = "jsonl"
    neuronpedia = "neuronpedia"
    saedashboard = "saedashboard"
    saevis = "saevis"


@app.command()
def export(
    database: Database,
    folder: Annotated[Path, typer.Argument(help="Folder to write to.", show_default=False)],
    to: Annotated[
        Formats,
        typer.Option(
            help="parquet: each table; jsonl: a feature a line; neuronpedia: its import in bulk; "
            "saedashboard: its batches; saevis: SAEDashboard's SaeVisData, for its own page."
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
    sae: Annotated[
        str | None,
        typer.Option(
            help="The SAE's folder; with --model, pages tell what a feature adds to the logits.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The model's checkpoint, of which the head is read; tiny-r1 is the shipped one.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files there.")] = False,
) -> None:
    """Write each table as a parquet file, or features for the pages of others."""
    from r1sae_fast.features.text import visible

    with open_database(database) as db:
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
                sae=sae,
                model=model,
                overwrite=overwrite,
            )
    for file in files:
        typer.echo(visible(str(file)))


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--features is {text!r}; expected ids by commas, such as 3,7") from None


def _load_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; expected a tokenizer.json")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001  # the library raises bare Exception
        raise ValueError(f"{file}: not a tokenizer.json ({error})") from None
