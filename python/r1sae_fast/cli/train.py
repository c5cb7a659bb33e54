"""``r1sae train``: an SAE from activation shards."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from r1sae_fast.sae import FastSAE
    from r1sae_fast.train import TrainConfig, TrainFile
    from r1sae_fast.train.parallel.layout import Layout
    from r1sae_fast.train.standardise import Source


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
    targets: Annotated[
        Path | None,
        typer.Option(
            help="Train a transcoder: shards of the same tokens at another point, which it makes "
            "of the first ones."
        ),
    ] = None,
    skip_connection: Annotated[
        bool,
        typer.Option("--skip-connection", help="A transcoder with a matrix past its features."),
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
    compute_dtype: Annotated[
        str, typer.Option(help="float32, or bfloat16 beside float32 weights that learn (CPU).")
    ] = "float32",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell steps and memory of the run, and end.")
    ] = False,
) -> None:
    """Train an SAE on harvested activations, or several at once: a file's \\[sweep].

    A stopped run goes on when the same command is run again, and ends in the same SAE.
    """
    from r1sae_fast.train import SweepResult, TrainConfig, read_train_file, train_sweep
    from r1sae_fast.train import train as run
    from r1sae_fast.train.loggers import logging_to
    from r1sae_fast.train.loggers import require as require_loggers
    from r1sae_fast.train.parallel.run import (
        is_first,
        is_launched,
        own_device,
        sweep_in_parallel,
        train_in_parallel,
    )

    settings: dict[str, Any] = {
        "d_sae": d_sae,
        "k": k,
        "mode": mode,
        "sparsity_loss": sparsity_loss,
        "sparsity_coefficient": sparsity_coefficient,
        "tied": tied,
        "skip_connection": skip_connection,
        "tokens": tokens,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "aux_k": aux_k,
        "dead_after_tokens": dead_after_tokens,
        "compute_dtype": compute_dtype,
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
        if targets is not None:
            # As the command line means it, not relative to the file.
            overrides["targets"] = str(targets.absolute())
        file = read_train_file(shards, overrides)
        config, out, layout, targets = file.config, file.out, file.layout, file.targets
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
    check_device(device)
    how: dict[str, Any] = {"device": device, "checkpoint_seconds": checkpoint_seconds}
    sweep = None if file is None else file.sweep
    if dry_run:
        rows = opened(file, shards, targets, device)
        for one in (sweep or {"": config}).values():
            tell_plan(one, rows)
        return
    narrowest = min(one.d_sae for one in (sweep or {"": config}).values())
    many = in_processes(layout, processes, narrowest)
    require_loggers(log)
    if many is not None and not is_launched():
        if file is None or file.data is None:
            # What is wrong with them is said once, and not by every process.
            opened(file, shards, targets, device)
        start_all(many)
        return
    activations = opened(file, shards, targets, device if many is None else str(own_device(device)))
    configs = sweep or {"": config}
    results: list[SweepResult]
    with (
        ending_lost(),
        logging_to(
            log if many is None or is_first() else [],
            out,
            {name: one.to_dict() for name, one in configs.items()},
        ) as teller,
    ):
        if sweep is not None and many is not None:
            results = sweep_in_parallel(activations, out, sweep, many, **how, on_metrics=teller)
        elif sweep is not None:
            results = train_sweep(activations, out, sweep, **how, on_metrics=teller)
        else:
            how["on_metrics"] = None if teller is None else functools.partial(teller, "")
            if many is None:
                results = [SweepResult("", out, run(activations, out, config, **how), None)]
            else:
                sae = train_in_parallel(activations, out, config, many, **how)
                results = [SweepResult("", out, sae, None)]
    for result in results:
        if result.error is not None and (many is None or is_first()):
            typer.echo(f"{result.folder}: {result.error}", err=True)
        elif result.sae is not None:
            tell(result.sae, result.folder, activations, evaluate_rows)
    if any(result.error is not None for result in results):
        raise typer.Exit(1)


def check_device(device: str) -> None:
    """Raises ValueError where torch knows no such device."""
    import torch

    try:
        torch.device(device)
    except RuntimeError:
        raise ValueError(
            f'device is {device!r}, which torch does not know; expected such as "cpu" or "cuda"'
        ) from None


def opened(file: TrainFile | None, shards: Path, targets: Path | None, device: str) -> Source:
    """What the run is trained on."""
    from r1sae_fast.shards import ActivationShards, PairedShards

    if file is not None and file.data is not None:
        return file.data.open(file.folder, device)
    folder = shards if file is None or file.shards is None else file.shards
    inputs = ActivationShards(folder)
    return inputs if targets is None else PairedShards(inputs, targets)


def tell(sae: FastSAE, out: Path, activations: Source, evaluate_rows: int) -> None:
    """What was trained, where its time went, and how good it is."""
    from r1sae_fast.train import EngineRows, evaluate, metrics

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
    if evaluate_rows > 0 and not isinstance(activations, EngineRows):
        found = evaluate(sae, activations, max_rows=evaluate_rows)
        typer.echo(
            f"on {found.rows:,} of its rows: FVU {found.fvu:.4f} (explained variance "
            f"{found.explained_variance:.4f}), L0 {found.l0:.2f}, dead {found.dead_fraction:.1%}"
        )


def tell_plan(config: TrainConfig, activations: Source) -> None:
    """What a run is going to be, before it."""
    from r1sae_fast.shards import PairedShards
    from r1sae_fast.train.memory import expected_memory

    transcodes = isinstance(activations, PairedShards)
    memory = expected_memory(config, activations.d_in, transcodes=transcodes)
    typer.echo(
        f"{config.mode}, d_in {activations.d_in}, d_sae {config.d_sae}: {config.steps:,} steps of "
        f"{config.batch_size:,} rows, learning rate {config.peak_learning_rate:.3g}\n"
        f"memory: {memory}, on the CPU, in one process; a dead "
        f"feature takes {8 * activations.d_in:,} bytes more"
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


def start_all(layout: Layout) -> None:
    """Runs this very command in as many processes as the layout has, and waits for them.

    Raises:
        Exit: they were told to stop, and have saved.
        LostRankError: one of them failed.
    """
    from r1sae_fast.train.parallel.launch import launch

    status = launch(
        ["-m", "r1sae_fast.cli", *sys.argv[1:]], layout.processes, layout.timeout_seconds
    )
    if status:
        raise typer.Exit(status)


@contextmanager
def ending_lost() -> Iterator[None]:
    """A rank that lost another one ends with a status that says so."""
    from r1sae_fast.errors import LostRankError
    from r1sae_fast.train.parallel.launch import LOST

    try:
        yield
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
