"""``r1sae encode``: activation shards to code shards."""

from pathlib import Path
from typing import Annotated, cast

import typer


def encode(
    shards: Annotated[
        Path, typer.Argument(help="Folder of activation shards, as r1sae harvest writes it.")
    ],
    sae: Annotated[Path, typer.Argument(help="Folder of the SAE, as r1sae train writes it.")],
    out: Annotated[Path, typer.Argument(help="Folder for the code shards.")],
    mode: Annotated[
        str | None,
        typer.Option(
            help="topk, batch_topk or threshold; default: the SAE's own, but threshold instead of "
            "batch_topk where the SAE has one, since then codes do not depend on batches."
        ),
    ] = None,
    batch_rows: Annotated[
        int, typer.Option(help="Rows at a time; with batch_topk it has a say in the codes.")
    ] = 4096,
    values_dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    skip_outliers: Annotated[
        bool,
        typer.Option("--skip-outliers", help="No codes for rows that training left out."),
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
) -> None:
    """Encode activations into sparse codes.

    A stopped run goes on when the same command is run again, and ends in the same codes.
    """
    from r1sae_fast.encode import choose_mode, encode_shards
    from r1sae_fast.sae import FastSAE, Mode

    model = FastSAE.load(sae, device=device)
    chosen = choose_mode(model, cast(Mode | None, mode))
    limit = model.metadata.get("norm_limit") if skip_outliers else None
    if skip_outliers and limit is None:
        raise ValueError(f"{sae}: this SAE does not say which rows are outliers")
    how = f"mode {chosen}"
    if chosen == "batch_topk":
        how += f", {batch_rows} rows a batch (codes depend on it)"
    elif chosen == "threshold" and model.threshold.dim() == 0:
        how += f", codes above {float(model.threshold):.4g}"
    typer.echo(how, err=True)
    codes = encode_shards(
        model,
        shards,
        out,
        batch_rows=batch_rows,
        mode=chosen,
        values_dtype=values_dtype,
        norm_limit=limit,
    )
    typer.echo(
        f"{out}: {len(codes):,} rows, {codes.nnz:,} codes "
        f"(L0 {codes.nnz / max(len(codes), 1):.2f}), d_sae {codes.d_sae}; {how}"
    )


def register(app: typer.Typer) -> None:
    """Adds the command to the root app."""
    app.command("encode", rich_help_panel="The chain")(encode)
