"""``r1sae inspect``: what a checkpoint holds, what a tap needs, what is missing or wrong."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from r1sae_fast.r1.inspection import Inspection, Part

_SHOWN_PROBLEMS = 50


def inspect(
    checkpoint: Annotated[
        str,
        typer.Argument(help='Folder of a DeepSeek-V3 or R1 checkpoint, or "tiny-r1".'),
    ] = "tiny-r1",
    layer: Annotated[
        int | None,
        typer.Option(help="Block to be tapped, from 0; default the last.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Shows a checkpoint's architecture, shards, bytes a layer and what a tap needs of it.

    Reads the headers alone, so it takes R1's 641 GiB in about a second. Exits 1 where something
    is missing or wrong, and names it.

    [dim]r1sae inspect DeepSeek-R1 --layer 37[/]
    """
    from r1sae_fast.r1.engines.base import resolve_checkpoint
    from r1sae_fast.r1.inspection import inspect_checkpoint

    found = inspect_checkpoint(resolve_checkpoint(checkpoint), layer)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        from rich.console import Console

        _show(Console(), found)
    if found.problems:
        raise typer.Exit(1)


def _show(console: Console, found: Inspection) -> None:
    from rich.table import Table

    from r1sae_fast.features.text import visible

    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_column(style="cyan", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("checkpoint", visible(found.directory))
    for name, value in _architecture(found):
        facts.add_row(name, value)
    facts.add_row("quantisation", found.quantization)
    facts.add_row("shards", f"{found.shards:,} files, {size(found.shard_bytes)}")
    console.print(facts)
    if found.parts:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("part", "tensors", "bytes", "dtypes"):
            right = column in ("tensors", "bytes")
            table.add_column(column, justify="right" if right else "left", overflow="fold")
        for title, part in _runs(found.parts):
            dtypes = ", ".join(f"{dtype} {size(count)}" for dtype, count in part.dtypes.items())
            table.add_row(title, f"{part.tensors:,}", size(part.bytes), visible(dtypes))
        console.print()
        console.print(table)
    if found.tap is not None:
        tap = found.tap
        console.print()
        memory = ", ".join(f"{size(count)} as {kind}" for kind, count in tap.memory.items())
        console.print(
            f"A tap after block {tap.layer} reads {size(tap.bytes)}: {tap.tensors:,} tensors "
            f"in {len(tap.shards):,} of {found.shards:,} shards.\n"
            f"Its weights take {memory}.",
            highlight=False,
        )
    console.print()
    for problem in found.problems[:_SHOWN_PROBLEMS]:
        console.print(f"wrong: {visible(problem)}", style="red", markup=False, soft_wrap=True)
    more = len(found.problems) - _SHOWN_PROBLEMS
    if more > 0:
        console.print(f"and {more:,} more; --json lists all", style="red")
    if not found.problems:
        console.print("Nothing is missing or wrong.", style="green")


def _architecture(found: Inspection) -> list[tuple[str, str]]:
    if not found.architecture:
        return []
    known = found.architecture
    experts = (
        f"{known['n_routed_experts']} routed + {known['n_shared_experts']} shared, "
        f"{known['num_experts_per_tok']} a token, "
        f"{known['topk_group']} of {known['n_group']} groups"
    )
    scaling = known["rope_scaling"]
    context = f"{known['max_position_embeddings']:,} tokens"
    if scaling:
        context += (
            f" (yarn {scaling['factor']:g} x {scaling['original_max_position_embeddings']:,})"
        )
    return [
        ("architecture", str(known["model_type"])),
        ("width", f"{known['hidden_size']:,}, vocabulary {known['vocab_size']:,}"),
        (
            "blocks",
            f"{known['num_hidden_layers']}, the first {known['first_k_dense_replace']} dense",
        ),
        (
            "attention",
            f"{known['num_attention_heads']} heads of {known['qk_nope_head_dim']} + "
            f"{known['qk_rope_head_dim']}, values {known['v_head_dim']}, latent "
            f"{known['kv_lora_rank']} + {known['qk_rope_head_dim']}",
        ),
        ("experts", experts),
        ("context", context),
    ]


def _runs(parts: list[Part]) -> list[tuple[str, Part]]:
    """Blocks of the same size as one line."""
    lines = []
    for _, run in itertools.groupby(parts, lambda p: (p.name[:6], p.tensors, p.dtypes)):
        members = list(run)
        first, last = members[0], members[-1]
        title = first.name
        if len(members) > 1:
            title = f"blocks {first.name.split()[-1]} to {last.name.split()[-1]}, each"
        lines.append((title, first))
    return lines


def size(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"


def register(app: typer.Typer) -> None:
    """Adds the command to the root app."""
    app.command("inspect", rich_help_panel="Models")(inspect)
