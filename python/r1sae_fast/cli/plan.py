"""``r1sae plan``: what R1's residuals take on a machine given by its numbers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from r1sae_fast.r1.stream.outlook import Machine, Task, Way


def plan(
    layer: Annotated[
        int, typer.Option(min=0, help="Block whose output is kept, counted from 0.")
    ] = 37,
    tokens: Annotated[float, typer.Option(help="Tokens to harvest.")] = 1e9,
    memory: Annotated[
        str | None, typer.Option(help="Where the products are computed, such as 24GiB.")
    ] = None,
    disk: Annotated[float | None, typer.Option(help="GB/s that weights are read with.")] = None,
    tflops: Annotated[float | None, typer.Option(help="TFLOP/s that products reach.")] = None,
    here: Annotated[
        bool, typer.Option("--here", help="Measure what is not given on this machine (CPU).")
    ] = False,
    fp8_kernels: Annotated[
        bool,
        typer.Option(help="fp8 is multiplied as it is; --no-...: dequantised first, as on a CPU."),
    ] = True,
    gpus: Annotated[int, typer.Option(min=1, help="The third way: so many GPUs.")] = 8,
    gpu_memory: Annotated[str, typer.Option(help="Of each.")] = "141GB",
    gpu_tflops: Annotated[float, typer.Option(help="Peak of each, fp8 (1979: an H200).")] = 1979,
    utilisation: Annotated[
        float,
        typer.Option(
            help="Part of their peak that is reached; 0.09 is what is reported of R1 served on "
            "eight H200s (about 18,000 tokens/s of prefill)."
        ),
    ] = 0.09,
    context: Annotated[int, typer.Option(min=1, help="Tokens a sequence.")] = 4096,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences run together.")] = 1,
    pass_tokens: Annotated[
        int, typer.Option(min=1, help="Streaming: tokens for which the weights are read once.")
    ] = 2**20,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A checkpoint folder, by its headers; default: R1's own numbers."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Tokens/s and days per billion tokens of three ways to R1's residuals, with the arithmetic.

    Resident: all weights in memory. Streaming: read from the disk block by block
    (harvest --engine stream). GPUs: spread over several that hold them all.

    [dim]r1sae plan --memory 24GiB --disk 3 --tflops 80[/]
    """
    if tokens < 1 or not tokens < float("inf"):
        raise ValueError(f"--tokens is {tokens}, expected at least 1")
    if not 0 < utilisation <= 1:
        raise ValueError(f"--utilisation is {utilisation}, expected above 0, at most 1")
    for name, value in (("disk", disk), ("tflops", tflops), ("gpu-tflops", gpu_tflops)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name} is {value}, expected a number above 0")

    from r1sae_fast.r1.stream.outlook import Gpus, on_gpus, resident, streaming
    from r1sae_fast.r1.stream.sizes import parse_size

    task = _task(checkpoint, layer, context, pass_tokens, batch_size)
    given = None if memory is None else parse_size(memory)
    machine = _machine(task, checkpoint, given, disk, tflops, here, fp8_kernels)
    several = Gpus(gpus, parse_size(gpu_memory), gpu_tflops * 1e12, utilisation)
    ways = [resident(task, machine), streaming(task, machine), on_gpus(task, several)]
    if as_json:
        import json

        typer.echo(json.dumps(_numbers(task, machine, ways, tokens, checkpoint), indent=2))
    else:
        _show(task, machine, ways, tokens, checkpoint)


def _task(
    checkpoint: Path | None, layer: int, context: int, pass_tokens: int, batch_size: int
) -> "Task":
    from r1sae_fast.r1.config import R1Config
    from r1sae_fast.r1.layout import block_specs, embedding_specs
    from r1sae_fast.r1.stream.arithmetic import r1_is_fp8
    from r1sae_fast.r1.stream.outlook import Task

    config, is_fp8, total, reader = R1Config(), r1_is_fp8, None, None
    if checkpoint is not None:
        from r1sae_fast.r1.weights import CheckpointReader

        reader = CheckpointReader(checkpoint)
        config = R1Config.from_dict(reader.config, str(checkpoint / "config.json"))
    if layer >= config.num_hidden_layers:
        raise ValueError(
            f"layer {layer} does not exist: the model has 0 to {config.num_hidden_layers - 1}"
        )
    if context > config.max_position_embeddings:
        raise ValueError(f"--context is {context}, the model's is {config.max_position_embeddings}")
    if reader is not None:
        specs = list(embedding_specs(config))
        for index in range(layer + 1):
            specs += block_specs(config, index)
        fp8 = {spec.name for spec in specs if reader.is_fp8(spec)}
        names = [spec.name for spec in specs]
        names += [spec.scale_name for spec in specs if spec.name in fp8]
        total = sum(reader.entry(name).nbytes for name in names)
        reader.close()

        def is_fp8(spec: Any) -> bool:
            """By the headers; later blocks, which were not looked at, as R1's."""
            return spec.name in fp8 if spec.name in known else r1_is_fp8(spec)

        known = {spec.name for spec in specs}
    return Task(config, is_fp8, layer, context, pass_tokens, batch_size, total)


def _machine(
    task: "Task",
    checkpoint: Path | None,
    memory: int | None,
    disk: float | None,
    tflops: float | None,
    here: bool,
    kernels: bool,
) -> "Machine":
    """As given; what is not, measured, or a desktop with one large GPU."""
    from r1sae_fast.r1.stream.outlook import Machine

    if not here:
        return Machine(
            memory=24 * 2**30 if memory is None else memory,
            disk=(3.0 if disk is None else disk) * 1e9,
            flops=(80.0 if tflops is None else tflops) * 1e12,
            kernels=kernels,
        )
    import torch

    from r1sae_fast.r1.memory import available_memory
    from r1sae_fast.r1.stream.speeds import dequantize_speed, disk_speed, product_speed

    if disk is None and checkpoint is None:
        raise ValueError(
            "--here measures the disk where a checkpoint is: give --checkpoint, or --disk"
        )
    device, dtype = torch.device("cpu"), torch.bfloat16
    width = min(task.config.hidden_size, 2048)
    return Machine(
        memory=memory or available_memory() or 2**34,
        disk=disk_speed(checkpoint) if disk is None and checkpoint else (disk or 0.0) * 1e9,
        flops=product_speed(1024, width, width, dtype, device) if tflops is None else tflops * 1e12,
        kernels=False,
        dequantize=dequantize_speed(width, width, dtype, device),
    )


def _numbers(
    task: "Task", machine: "Machine", ways: "list[Way]", tokens: float, checkpoint: Path | None
) -> dict[str, Any]:
    from r1sae_fast.r1.stream.arithmetic import work

    part = work(task.config, task.layer, task.context)
    return {
        "model": "DeepSeek-R1" if checkpoint is None else str(checkpoint),
        "layer": task.layer,
        "context": task.context,
        "tokens": tokens,
        "bytes_of_weights": task.weights,
        "active_weights_a_token": part.weights,
        "flops_a_token": part.flops,
        "attention_flops_a_token": part.attention,
        "machine": vars(machine),
        "ways": [
            {
                "way": way.name,
                "tokens_per_second": way.tokens_per_second,
                "days": way.days(tokens),
                "days_per_billion_tokens": way.days(1e9),
                "limit": way.limit,
                **way.numbers,
            }
            for way in ways
        ],
    }


def _show(
    task: "Task", machine: "Machine", ways: "list[Way]", tokens: float, checkpoint: Path | None
) -> None:
    from rich.console import Console
    from rich.table import Table

    from r1sae_fast.r1.stream.outlook import model_lines
    from r1sae_fast.r1.stream.sizes import show_size

    console = Console()

    def say(line: str, style: str = "") -> None:
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    name = "DeepSeek-R1" if checkpoint is None else str(checkpoint)
    say(f"{name}, residual stream after block {task.layer}, sequences of {task.context:,}", "bold")
    for line in model_lines(task):
        say(f"  {line}")
    say(
        f"machine: {show_size(machine.memory)} of memory, disk {machine.disk / 1e9:.4g} GB/s, "
        f"{machine.flops / 1e12:.4g} TFLOP/s",
        "bold",
    )
    for way in ways:
        say(way.name, "bold cyan")
        for line in way.lines:
            say(f"  {line}")
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("way")
    columns = ("tokens/s", "days per billion tokens", f"days for {tokens:,.4g} tokens", "limit")
    for column in columns[: 4 if tokens != 1e9 else 2]:
        table.add_column(column, justify="right")
    if tokens == 1e9:
        table.add_column("limit", justify="right")
    for way in ways:
        rate, days = way.tokens_per_second, way.days(1e9)
        cells = [way.name, "-" if rate is None else f"{rate:,.4g}"]
        cells.append("does not fit" if days is None else f"{days:,.3g}")
        if tokens != 1e9:
            mine = way.days(tokens)
            cells.append("-" if mine is None else f"{mine:,.3g}")
        table.add_row(*cells, way.limit)
    console.print(table)


def register(app: typer.Typer) -> None:
    """Adds the command to the root app."""
    app.command("plan", rich_help_panel="The chain")(plan)
