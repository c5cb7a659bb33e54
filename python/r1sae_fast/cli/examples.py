"""``r1sae examples``: each feature's strongest rows, in one pass over code shards."""

from pathlib import Path
from typing import Annotated

import typer


def examples(
    codes: Annotated[
        Path, typer.Argument(help="Folder of code shards, as r1sae encode writes it.")
    ],
    out: Annotated[Path, typer.Argument(help="File to write (safetensors).")],
    n: Annotated[int, typer.Option("--n", "-n", help="Examples to keep of each feature.")] = 20,
    threads: Annotated[int | None, typer.Option(help="At most so many; default: all CPUs.")] = None,
    checkpoint_seconds: Annotated[
        float, typer.Option(help="Save what is done so far about so often.")
    ] = 30.0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it exists.")
    ] = False,
) -> None:
    """Collect the max-activating examples of every feature.

    One pass, in memory that does not grow with the number of tokens. A stopped run goes on from
    OUT.checkpoint when the same command is run again.
    """
    from r1sae_fast.examples import collect_examples

    if out.exists() and not overwrite:
        raise FileExistsError(f"{out}: exists already; pass --overwrite to replace it")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such folder; make it first")
    checkpoint = out.with_name(out.name + ".checkpoint")
    found = collect_examples(
        codes, n, threads=threads, checkpoint=checkpoint, checkpoint_seconds=checkpoint_seconds
    )
    found.save(out)
    checkpoint.unlink(missing_ok=True)

    alive = int((found.counts > 0).sum())
    activations = int(found.counts.sum())
    typer.echo(
        f"{out}: {found.scanned:,} rows, {activations:,} activations "
        f"(L0 {activations / max(found.scanned, 1):.1f}), "
        f"{alive:,} of {found.d_sae:,} features alive, {found.n} examples each"
    )


def register(app: typer.Typer) -> None:
    """Adds the command to the root app."""
    app.command("examples", rich_help_panel="The chain")(examples)
