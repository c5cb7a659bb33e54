"""``r1sae tiny-r1``: where the shipped model is, what it can do, and how it was made."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from r1sae_fast.tiny_r1.evaluate import Evaluation

app = typer.Typer(
    help="TinyR1, the small reasoning model in the package: evaluate, ask, or train it anew.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Model = Annotated[str, typer.Option(help="A checkpoint folder; tiny-r1 is the shipped one.")]


@app.command()
def path() -> None:
    """Prints the folder of the shipped checkpoint."""
    from r1sae_fast import tiny_r1

    typer.echo(tiny_r1.path())


@app.command()
def solve(
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Problems to solve.")] = 3,
    family: Annotated[str | None, typer.Option(help="Only problems of this family.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Which problems, and the draws.")] = 0,
    model: Model = "tiny-r1",
) -> None:
    """Shows the model think about held-out problems."""
    from itertools import islice

    from rich.console import Console
    from rich.text import Text

    from r1sae_fast.r1 import LocalEngine
    from r1sae_fast.tiny_r1.problems import FAMILIES, problems

    if family is not None and family not in FAMILIES:
        raise ValueError(f"no family {family!r}; there are {', '.join(FAMILIES)}")
    wanted = [family] if family else list(FAMILIES)
    source = (p for p in problems(seed, held_out=True) if p.family in wanted)
    chosen = list(islice(source, count))
    engine = LocalEngine.from_pretrained(model)
    answers = engine.generate(
        [problem.prompt for problem in chosen],
        max_new_tokens=256,
        temperature=temperature,
        seed=seed,
    )
    console = Console()
    for problem, answer in zip(chosen, answers, strict=True):
        thinking, _, response = answer.text.partition("</think>")
        console.print(Text(problem.prompt, style="bold"))
        console.print(Text(thinking.strip(), style="italic"))
        right = f" {problem.answer}." in response
        mark = "[green]right[/]" if right else f"[red]wrong, it is {problem.answer}[/]"
        console.print(Text(response.strip(), style="cyan"), mark, "\n")


@app.command("eval")
def evaluate(
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Held-out problems.")] = 700,
    seed: Annotated[int, typer.Option(help="Which problems.")] = 1,
    model: Model = "tiny-r1",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
) -> None:
    """Measures answers, form, and whether "Wait" follows wrong steps and only those."""
    import json

    from r1sae_fast.tiny_r1.evaluate import evaluate as run

    result = run(model, count=count, seed=seed, progress=show_progress)
    _show(result)
    if json_file is not None:
        json_file.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")


def show_progress(done: int, total: int, what: str) -> None:
    """A line on stderr that is written over, where that is a terminal."""
    import sys

    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        typer.echo(f"\r{what} {done}/{total}", err=True, nl=False)
        typer.echo(end, err=True, nl=False)


def _show(result: "Evaluation") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.model}: {result.problems} held-out problems, greedy")
    table.add_column("what")
    table.add_column("found", justify="right")
    table.add_column("bar", justify="right")
    # What, its figure, the bound it is held to, and whether that is a lower bound.
    rows = [
        ("right final answer", result.accuracy, 0.95, True),
        ("well-formed <think>...</think>", result.well_formed, 0.98, True),
        ('P("Wait") after a planted wrong step', result.wait_after_wrong, 0.8, True),
        ('P("Wait") after the same step, right', result.wait_after_right, 0.05, False),
    ]
    for what, found, bound, at_least in rows:
        met = found >= bound if at_least else found <= bound
        style, sign = "green" if met else "red", ">=" if at_least else "<="
        table.add_row(what, f"[{style}]{found:.4f}[/]", f"{sign} {bound:.2f}")
    table.add_section()
    table.add_row('AUROC of P("Wait"), wrong against right', f"{result.wait_auroc:.4f}", "")
    table.add_row("recovers from a planted wrong step", f"{result.recovered:.4f}", "")
    for family, accuracy in result.by_family.items():
        table.add_row(f"right answer, {family}", f"{accuracy:.4f}", "")
    Console().print(table)


@app.command()
def train(
    out: Annotated[Path, typer.Argument(help="The run's folder; run again, it goes on.")],
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Optimiser steps of the whole run. Default: the recipe's."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Use torch.compile (needs a C++ compiler).")
    ] = False,
) -> None:
    """Trains TinyR1 from nothing and writes OUT/checkpoint in R1's layout."""
    import torch
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from r1sae_fast.tiny_r1.export import export
    from r1sae_fast.tiny_r1.recipe import Recipe, Training

    if threads is not None:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(seed=seed) if steps is None else Recipe(seed=seed, steps=steps)
    training = Training(recipe, out, compiled=compiled)
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(),
    )
    from rich.console import Console

    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("loss -", total=recipe.steps, completed=training.step)

        def report(figures: dict[str, float]) -> None:
            speed = figures["tokens_per_second"]
            description = f"loss {figures['loss']:.4f}, {speed:,.0f} tokens/s"
            bar.update(task, completed=figures["step"], description=description)
            if "traces_right" in figures:
                bar.console.print(
                    f"step {figures['step']:>6.0f}  loss {figures['held_out_loss']:.4f}  "
                    f"traces right {figures['traces_right']:.3f}  "
                    f"doubts slips {figures['doubt_after_slip']:.3f}, "
                    f"right steps {figures['doubt_after_right']:.3f}"
                )

        try:
            training.run(report)
        except KeyboardInterrupt:
            training.save()
            raise
    export(training, out / "checkpoint")
    typer.echo(out / "checkpoint")


def register(root: typer.Typer) -> None:
    """Adds the group to the root app."""
    root.add_typer(app, name="tiny-r1", rich_help_panel="Models")
