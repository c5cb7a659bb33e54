"""``r1sae train``: an SAE from activation shards."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from r1sae_fast.sae import FastSAE
    from r1sae_fast.shards import ActivationShards
    from r1sae_fast.train import EngineRows, TrainConfig
    from r1sae_fast.train.parallel.layout import Layout


def train(
    context: typer.Context,
    shards: Annotated[
        Path,
        typer.Argument(
            help="Folder of activation shards, as r1sae harvest writes it; or a .toml file with "
            "the settings of the run, shards and out among them."
        ),
    ],
    out: Annotated[
        Path | None, typer.Argument(help="Folder for the SAE, its metrics and checkpoint.")
    ] = None,
    d_sae: Annotated[int, typer.Option(help="Number of features.")] = 4096,
    k: Annotated[
        int | None,
        typer.Option(
            "--k", "-k", help="Codes a row, on average; default 16 where the mode has a k."
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="Rows to train on in all; the shards are repeated as needed.")
    ] = 10_000_000,
    mode: Annotated[
        str, typer.Option(help="batch_topk, topk, matryoshka, jumprelu or relu.")
    ] = "batch_topk",
    sparsity_loss: Annotated[
        str | None,
        typer.Option(help="Of jumprelu: target (aims at k), l0 or tanh (weighed against error)."),
    ] = None,
    sparsity_coefficient: Annotated[
        float | None, typer.Option(help="Weight of jumprelu's or relu's sparsity loss.")
    ] = None,
    tied: Annotated[
        bool, typer.Option("--tied", help="One matrix encodes and decodes, as in R1's SAEs.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Rows of a step.")] = 4096,
    learning_rate: Annotated[
        float | None, typer.Option(help="Adam's peak; default by d_sae and number of steps.")
    ] = None,
    aux_k: Annotated[
        int | None, typer.Option(help="Dead features a row in the auxiliary loss; default d_in/2.")
    ] = None,
    dead_after_tokens: Annotated[
        int | None, typer.Option(help="A feature silent for so long is dead.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first weights and the order of rows.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    checkpoint_seconds: Annotated[float, typer.Option(help="Save the state so often.")] = 60.0,
    evaluate_rows: Annotated[
        int, typer.Option(help="Rows to evaluate the finished SAE on; 0 for none.")
    ] = 65536,
    log: Annotated[
        list[str],
        typer.Option(help="Send metrics to tensorboard or wandb, too; may be repeated."),
    ] = [],  # noqa: B006  # typer copies it
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Train in so many processes on this machine (for several: torchrun). They share "
            "the features, unless the file's \\[parallel] says otherwise.",
        ),
    ] = None,
) -> None:
    """Train an SAE on harvested activations, or several at once: a file's \\[sweep].

    A stopped run goes on when the same command is run again, and ends in the same SAE.
    """
    from r1sae_fast.shards import ActivationShards
    from r1sae_fast.train import TrainConfig, read_train_file, train_sweep
    from r1sae_fast.train import train as run
    from r1sae_fast.train.loggers import logging_to

    settings: dict[str, Any] = {
        "d_sae": d_sae,
        "k": k,
        "mode": mode,
        "sparsity_loss": sparsity_loss,
        "sparsity_coefficient": sparsity_coefficient,
        "tied": tied,
        "tokens": tokens,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "aux_k": aux_k,
        "dead_after_tokens": dead_after_tokens,
        "seed": seed,
    }
    layout = file = None
    if shards.suffix == ".toml":
        run_settings: dict[str, Any] = {"device": device, "checkpoint_seconds": checkpoint_seconds}
        run_settings |= {"evaluate_rows": evaluate_rows}
        overrides = {
            name: value for name, value in (settings | run_settings).items() if given(context, name)
        }
        if out is not None:
            overrides["out"] = str(out)
        file = read_train_file(shards, overrides)
        config, out, layout = file.config, file.out, file.layout
        log = [*log, *(name for name in file.log if name not in log)]
        device = device if file.device is None else file.device
        if file.checkpoint_seconds is not None:
            checkpoint_seconds = file.checkpoint_seconds
        evaluate_rows = evaluate_rows if file.evaluate_rows is None else file.evaluate_rows
    elif out is None:
        raise ValueError("give the folder for the SAE after that of the shards (or a .toml file)")
    else:
        if k is None and mode != "relu" and sparsity_loss in (None, "target"):
            settings["k"] = 16
        config = TrainConfig(**settings)
    how: dict[str, Any] = {"device": device, "checkpoint_seconds": checkpoint_seconds}
    many = in_processes(layout, processes, config.d_sae)
    sweep = None if file is None else file.sweep
    if many is not None and (sweep or log or (file is not None and file.data)):
        raise ValueError(
            "a sweep, rows straight from an engine, and loggers are for one process; leave out "
            "--processes and [parallel], or train SAEs one by one from shards"
        )
    activations: ActivationShards | EngineRows
    if file is None:
        activations = ActivationShards(shards)
    elif file.data is not None:
        activations = file.data.open(file.folder, device)
    else:
        assert file.shards is not None
        activations = ActivationShards(file.shards)
    if many is not None:
        assert isinstance(activations, ActivationShards)
        sae = train_as_one_of_many(activations, out, config, many, how)
        if sae is not None:
            tell(sae, out, activations, evaluate_rows)
        return
    settings_of = {name: one.to_dict() for name, one in (sweep or {"": config}).items()}
    with logging_to(log, out, settings_of) as teller:
        if sweep is None:
            to_log = None if teller is None else functools.partial(teller, "")
            sae = run(activations, out, config, **how, on_metrics=to_log)
            tell(sae, out, activations, evaluate_rows)
            return
        results = train_sweep(activations, out, sweep, **how, on_metrics=teller)
    for result in results:
        if result.sae is None:
            typer.echo(f"{result.folder}: {result.error}", err=True)
        else:
            tell(result.sae, result.folder, activations, evaluate_rows)
    if any(result.sae is None for result in results):
        raise typer.Exit(1)


def tell(
    sae: FastSAE, out: Path, activations: ActivationShards | EngineRows, evaluate_rows: int
) -> None:
    """What was trained, where its time went, and how good it is."""
    from r1sae_fast.shards import ActivationShards
    from r1sae_fast.train import evaluate, metrics

    typer.echo(
        f"{out}: d_in {sae.d_in}, d_sae {sae.d_sae}, k {sae.k}, {sae.mode}; trained on "
        f"{sae.metadata['tokens']:,} rows ({sae.metadata['left_out']:,} outliers left out), "
        f"threshold {float(sae.threshold.mean()):.4g}{' on average' if sae.threshold.dim() else ''}"
    )
    shares = metrics.time_shares(metrics.read_lines(out / metrics.FILE))
    if shares is not None:
        rest = max(0.0, 1.0 - sum(shares.values()))
        parts = ", ".join(f"{part} {share:.1%}" for part, share in shares.items())
        typer.echo(f"time: {parts}, other {rest:.1%}")
    # An engine's rows are gone.
    if evaluate_rows > 0 and isinstance(activations, ActivationShards):
        found = evaluate(sae, activations, max_rows=evaluate_rows)
        typer.echo(
            f"on {found.rows:,} of its rows: FVU {found.fvu:.4f} (explained variance "
            f"{found.explained_variance:.4f}), L0 {found.l0:.2f}, dead {found.dead_fraction:.1%}"
        )


def in_processes(layout: Layout | None, processes: int | None, d_sae: int) -> Layout | None:
    """The layout of the processes that train; None for this one alone.

    Raises:
        ValueError: the layout is for another number of processes than there are.
    """
    from r1sae_fast.train.parallel.layout import Layout
    from r1sae_fast.train.parallel.run import is_launched
    from r1sae_fast.train.parallel.run import processes as launched

    count = launched() if is_launched() else processes
    if count is None:
        count = 1 if layout is None else layout.processes
    if layout is None:
        # By features: work and memory are then shared out whole.
        layout = Layout(latents=count)
    layout.require(count, d_sae)
    return layout if count > 1 or is_launched() else None


def train_as_one_of_many(
    shards: ActivationShards, out: Path, config: TrainConfig, layout: Layout, how: dict[str, Any]
) -> FastSAE | None:
    """One rank's part of a run; in a process that no launcher has started, that of the launcher.

    Returns:
        The SAE in one process, which goes on with it; None in all others.
    """
    from r1sae_fast.errors import LostRankError
    from r1sae_fast.train.parallel.launch import LOST, launch
    from r1sae_fast.train.parallel.run import is_launched, train_in_parallel

    if not is_launched():
        status = launch(
            ["-m", "r1sae_fast.cli", *sys.argv[1:]], layout.processes, layout.timeout_seconds
        )
        if status:
            raise typer.Exit(status)
        return None
    try:
        return train_in_parallel(shards, out, config, layout, **how)
    except LostRankError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(LOST) from None


def given(context: typer.Context, name: str) -> bool:
    """Whether the option was written on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def register(app: typer.Typer) -> None:
    """Adds the command to the root app."""
    app.command("train", rich_help_panel="The chain")(train)
