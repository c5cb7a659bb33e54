"""``r1sae harvest``: run the model, keep its residual stream as activation shards."""

from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from r1sae_fast.harvest import HarvestProgress
    from r1sae_fast.prompts import Item
    from r1sae_fast.r1.engines.base import Engine
    from r1sae_fast.sae import FastSAE
    from r1sae_fast.sae import Mode as SaeMode


class Mode(str, Enum):
    """What is run."""

    generate = "generate"
    prefill = "prefill"


class Stored(str, Enum):
    """What activations are stored in."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"
    float8_e4m3 = "float8_e4m3"


class Computed(str, Enum):
    """What the model computes in."""

    bfloat16 = "bfloat16"
    float32 = "float32"


class Fp8(str, Enum):
    """How a checkpoint in fp8 is computed with."""

    w8a8 = "w8a8"
    dequantize = "dequantize"


class Engines(str, Enum):
    """What runs the model."""

    local = "local"
    hf = "hf"
    stream = "stream"


def harvest(
    layer: Annotated[
        int,
        typer.Option(help="Block whose output is kept, counted from 0 (hook model.layers.N)."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the shards; an earlier run goes on.")],
    model: Annotated[
        str,
        typer.Option(
            help="A checkpoint folder (with --engine hf also a repository of the hub); tiny-r1 is "
            "the shipped model."
        ),
    ] = "tiny-r1",
    engine: Annotated[
        Engines,
        typer.Option(
            help="local: DeepSeek-V3, R1, TinyR1. hf: any decoder that transformers loads, such "
            "as R1's distillations (needs the extra r1sae-fast\\[hf]). stream: as local, for "
            "models that don't fit in memory: many texts go through a block together, read from "
            "the disk once (mode prefill)."
        ),
    ] = Engines.local,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts: .txt (one a line) or .jsonl.")
    ] = None,
    tiny_problems: Annotated[
        int | None,
        typer.Option(min=1, help="Instead: so many of the problems that TinyR1 can solve."),
    ] = None,
    mode: Annotated[
        Mode | None,
        typer.Option(
            help="Let the model answer the prompts (default), or only read the given texts (all "
            "that --engine stream can)."
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop after the sequence that reaches so many tokens.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences run together; default 64, with --engine stream 1."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most, a sequence.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.6,
    top_p: Annotated[float, typer.Option(help="Nucleus of the draws.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws (and of the problems).")] = 0,
    dtype: Annotated[
        Stored | None,
        typer.Option(help="Stored; default bfloat16 for activations, float32 for codes."),
    ] = None,
    engine_dtype: Annotated[
        Computed, typer.Option(help="Of the model's arithmetic.")
    ] = Computed.bfloat16,
    fp8: Annotated[
        Fp8,
        typer.Option(
            help="A checkpoint in fp8: fp8 weights and activations as R1 is served, or weights "
            "dequantised to --engine-dtype."
        ),
    ] = Fp8.w8a8,
    device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
    rows_per_shard: Annotated[int, typer.Option(min=1, help="About, a shard.")] = 16384,
    max_memory: Annotated[
        str | None,
        typer.Option(help="With --engine stream: the process's memory, such as 24GiB."),
    ] = None,
    pass_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --engine stream: tokens for which the weights are read once (2^20)."
        ),
    ] = None,
    scratch: Annotated[
        Path | None,
        typer.Option(
            help="With --engine stream: folder for the hidden states between blocks; default "
            ".stream in the folder of the shards."
        ),
    ] = None,
    sae: Annotated[
        Path | None,
        typer.Option(help="Folder of an SAE: write its codes instead of the residual stream."),
    ] = None,
    sae_mode: Annotated[
        str | None,
        typer.Option(
            help="topk, batch_topk or threshold; default: the SAE's own, threshold instead of "
            "batch_topk, in which codes depend on what else is in the batch."
        ),
    ] = None,
    skip_outliers: Annotated[
        bool, typer.Option("--skip-outliers", help="No codes for rows that training left out.")
    ] = False,
) -> None:
    """Runs the model over prompts; writes its residual stream, or an SAE's codes of it, to shards.

    Stopped at any moment, it goes on when the same command is given again.

    [dim]r1sae harvest --tiny-problems 2000 --layer 3 --out run/activations[/]
    """
    if (prompts is None) == (tiny_problems is None):
        raise ValueError("give either --prompts FILE or --tiny-problems N")

    import torch

    from r1sae_fast.harvest import harvest as run
    from r1sae_fast.prompts import read_prompts
    from r1sae_fast.r1 import HfEngine, LocalEngine

    if engine is not Engines.stream and (max_memory or pass_tokens or scratch):
        raise ValueError("--max-memory, --pass-tokens and --scratch are of --engine stream")
    if engine is Engines.hf and fp8 is not Fp8.w8a8:
        raise ValueError("--fp8 is of --engine local and stream")
    streams = engine is Engines.stream
    mode = mode or (Mode.prefill if streams else Mode.generate)
    batch_size = batch_size or (1 if streams else 64)
    source: Iterable[Item] = _problems(tiny_problems or 0, seed)
    if prompts is not None:
        source = read_prompts(prompts)
    attached, limit = _attached(sae, device, sae_mode, skip_outliers)
    with ExitStack() as stack:
        bar = _Bar(tokens, tiny_problems)
        model_engine: Engine
        if engine is Engines.stream:
            from r1sae_fast.cli.stream_options import open_stream_engine

            model_engine = stack.enter_context(
                open_stream_engine(
                    model,
                    dtype=getattr(torch, engine_dtype.value),
                    fp8=fp8.value,
                    device=device,
                    max_memory=max_memory,
                    pass_tokens=pass_tokens,
                    scratch=scratch or out / ".stream",
                    rows_per_shard=rows_per_shard,
                    note=bar.note,
                )
            )
        else:
            options: dict[str, Any] = {} if engine is Engines.hf else {"fp8": fp8.value}
            model_engine = (HfEngine if engine is Engines.hf else LocalEngine).from_pretrained(
                model,
                dtype=getattr(torch, engine_dtype.value),
                device=device,
                last_layer=layer if mode is Mode.prefill else None,
                **options,
            )
        stack.enter_context(bar)
        result = run(
            model_engine,
            source,
            layer,
            out,
            mode=mode.value,
            dtype=None if dtype is None else dtype.value,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            token_budget=tokens,
            rows_per_shard=rows_per_shard,
            sae=attached,
            sae_mode=cast("SaeMode | None", sae_mode),
            norm_limit=limit,
            progress=bar,
        )
    typer.echo(
        f"{out}: {result.rows:,} rows of {result.sequences:,} sequences, "
        f"{result.new_rows:,} of them now ({result.rows_per_second:,.0f} rows/s)"
    )


def _attached(
    folder: Path | None, device: str, mode: str | None, skip_outliers: bool
) -> "tuple[FastSAE | None, float | None]":
    """The SAE, and the norm above which rows get no codes."""
    if folder is None:
        if mode is not None or skip_outliers:
            raise ValueError("--sae-mode and --skip-outliers are of an SAE; give --sae FOLDER")
        return None, None
    from r1sae_fast.sae import FastSAE

    sae = FastSAE.load(folder, device=device)
    limit = sae.metadata.get("norm_limit")
    if skip_outliers and limit is None:
        raise ValueError(f"{folder}: this SAE does not say which rows are outliers")
    return sae, limit if skip_outliers else None


def _problems(count: int, seed: int) -> "Iterable[Item]":
    from itertools import islice

    from r1sae_fast.tiny_r1.problems import problems

    return (problem.prompt for problem in islice(problems(seed, held_out=False), count))


class _Bar:
    """A progress bar on stderr: towards the budget of tokens, or else the number of prompts."""

    def __init__(self, tokens: int | None, prompts: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._by_rows = tokens is not None
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("harvest"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=tokens or prompts, state="loading")

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, now: "HarvestProgress") -> None:
        self._progress.update(
            self._task,
            completed=now.rows if self._by_rows else now.sequences,
            state=f"{now.rows:,} tokens  {now.sequences:,} sequences  "
            f"{now.rows_per_second:,.0f} tokens/s",
        )

    def note(self, text: str) -> None:
        """What is under way where nothing is written for long."""
        self._progress.update(self._task, state=text)


def register(app: typer.Typer) -> None:
    """Adds the command to the root app."""
    app.command("harvest", rich_help_panel="The chain")(harvest)
