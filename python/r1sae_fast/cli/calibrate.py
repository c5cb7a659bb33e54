"""``r1sae calibrate``: a threshold for an SAE that has none."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def calibrate(
    sae: Annotated[
        Path,
        typer.Argument(
            help="Folder of the SAE; or a .pt file of Goodfire's release (with --released)."
        ),
    ],
    shards: Annotated[
        Path, typer.Argument(help="Folder of activation shards, as r1sae harvest writes it.")
    ],
    out: Annotated[
        Path, typer.Argument(help="Folder for the SAE with its threshold; may be the SAE's own.")
    ],
    l0: Annotated[
        float | None, typer.Option("--l0", help="Codes a row, on average; default the SAE's k.")
    ] = None,
    max_rows: Annotated[int, typer.Option(help="Rows to measure on, drawn from all.")] = 65536,
    released: Annotated[
        str | None, typer.Option(help="Which of Goodfire's SAEs the file is: math or logic.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
) -> None:
    """Find the threshold with which rows get so many codes on average.

    With batch_topk, as the released SAEs are, a token's codes depend on its batch; with a threshold
    they do not. An SAE that has one is encoded with it by default (r1sae encode).
    """
    from r1sae_fast import FastSAE, load_logic_sae, load_math_sae
    from r1sae_fast.calibrate import calibrate as run
    from r1sae_fast.shards import ActivationShards

    loaders = {"math": load_math_sae, "logic": load_logic_sae}
    if released is not None and released not in loaders:
        raise ValueError(f"--released is {released!r}; expected math or logic")
    if released is None and sae.is_file():
        raise ValueError(f"{sae}: a file; say which of the released SAEs it is: --released logic")
    model = FastSAE.load(sae, device) if released is None else loaders[released](sae, device)
    found = run(model, ActivationShards(shards), l0, max_rows=max_rows)
    model.metadata = {**model.metadata, "calibration": asdict(found)}
    model.save(out)
    typer.echo(
        f"{out}: threshold {found.threshold:.6g}; {found.l0:.2f} codes a row on {found.rows:,} "
        f"rows ({found.left_out:,} outliers left out), {found.wanted:g} wanted; "
        "r1sae encode takes it by default"
    )


def register(app: typer.Typer) -> None:
    """Adds the command to the root app."""
    app.command("calibrate", rich_help_panel="The chain")(calibrate)
