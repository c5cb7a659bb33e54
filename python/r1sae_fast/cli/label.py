"""``r1sae label``: labels by a language model, with scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from r1sae_fast.labels import LabelRun, LabelSettings, Prices

_SHOWN = 20  # labels in the table at the end


def label(
    database: Annotated[Path, typer.Argument(help="The database file.", show_default=False)],
    features: Annotated[
        str | None,
        typer.Option(help="Which, such as 3,17,100-199; default: all alive.", show_default=False),
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(min=1, help="Of these so many, drawn at random.", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate requests, tokens and cost; send nothing.")
    ] = False,
    price_in: Annotated[
        float | None, typer.Option(help="Of a million prompt tokens.", show_default=False)
    ] = None,
    price_out: Annotated[
        float | None, typer.Option(help="Of a million completion tokens.", show_default=False)
    ] = None,
    max_cost: Annotated[
        float | None,
        typer.Option(
            help="Stop before this model's labels here cost more, earlier runs counted.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 16,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one answer.")] = 300.0,
    no_scores: Annotated[
        bool, typer.Option("--no-scores", help="Explain only: 1 request a feature, not 41.")
    ] = False,
    explain: Annotated[int, typer.Option(help="Windows to explain by.")] = 40,
    test: Annotated[int, typer.Option(help="Other active windows to score by.")] = 50,
    negatives: Annotated[int, typer.Option(help="Silent windows to score by.")] = 50,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 32,
    shown: Annotated[int, typer.Option(help="Windows in one prompt of a scorer.")] = 5,
    max_tokens: Annotated[
        int, typer.Option(help="Completion tokens of an answer; reasoning counts.")
    ] = 4096,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Ask again where no answer could be used before."),
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Only merge what is left in the journal.")
    ] = False,
) -> None:
    """Have a language model label features, and score the labels by detection and fuzzing.

    The model is behind any OpenAI-compatible endpoint, named by the environment:
    R1SAE_LABEL_URL (such as http://localhost:8000/v1), R1SAE_LABEL_MODEL, R1SAE_LABEL_KEY where a
    key is wanted, R1SAE_SCORE_MODEL where another model is to score. What is finished is kept and
    nothing is asked twice: the same command goes on.
    """
    from r1sae_fast.labels import LabelSettings, Prices, merge_labels

    if merge:
        typer.echo(f"{merge_labels(database):,} labels merged into {database}")
        return
    if (price_in is None) != (price_out is None):
        raise ValueError("only one price is given; expected --price-in and --price-out")
    prices = None if price_in is None or price_out is None else Prices(price_in, price_out)
    settings = LabelSettings(
        explain=explain,
        test=test,
        negatives=negatives,
        context=context,
        shown=shown,
        explain_tokens=max_tokens,
        score_tokens=max_tokens,
        scorers=() if no_scores else LabelSettings.scorers,
    )
    wanted = _features(database, features, sample, settings.seed)
    if dry_run:
        _plan(database, settings, wanted, prices, retry_failed)
    else:
        _label(database, settings, wanted, prices, max_cost, jobs, timeout, retry_failed)


def _label(
    database: Path,
    settings: LabelSettings,
    wanted: list[int] | None,
    prices: Prices | None,
    max_cost: float | None,
    jobs: int,
    timeout: float,
    retry_failed: bool,
) -> None:
    from r1sae_fast.features.text import visible
    from r1sae_fast.labels import Endpoint, LabelRun, label_features
    from r1sae_fast.labels.report import live, summary

    endpoint = Endpoint.from_environment()
    last = LabelRun()
    try:
        with live() as watch:

            def follow(run: LabelRun) -> None:
                nonlocal last
                last = run
                watch(run)

            last = label_features(
                database,
                endpoint,
                settings,
                wanted,
                prices=prices,
                max_cost=max_cost,
                jobs=jobs,
                timeout=timeout,
                retry_failed=retry_failed,
                watch=follow,
            )
    finally:
        if last.model_name:
            _table(database, last)
            for line in summary(last):
                typer.echo(visible(line), err=True)


def _table(database: Path, run: LabelRun) -> None:
    from rich.console import Console

    from r1sae_fast.features import FeatureDB
    from r1sae_fast.labels.report import table

    if not run.labelled_features:
        return
    with FeatureDB(database) as db:
        rows = []
        for feature in sorted(run.labelled_features)[:_SHOWN]:
            who = (run.model_name, run.prompt_version)
            labels = db.labels(feature)
            rows += [(feature, x) for x in labels if (x.model_name, x.prompt_version) == who]
    Console(markup=False, highlight=False).print(table(rows))
    if len(run.labelled_features) > _SHOWN:
        typer.echo(f"... and {len(run.labelled_features) - _SHOWN:,} more: r1sae features show")


def _plan(
    database: Path,
    settings: LabelSettings,
    wanted: list[int] | None,
    prices: Prices | None,
    retry_failed: bool,
) -> None:
    import os

    from r1sae_fast.labels.endpoint import MODEL, SCORER
    from r1sae_fast.labels.plan import plan_labels

    model, scorer = (os.environ.get(name, "").strip() or None for name in (MODEL, SCORER))
    plan = plan_labels(
        database,
        settings,
        wanted,
        model=model,
        scorer=scorer,
        prices=prices,
        retry_failed=retry_failed,
    )
    about = "" if plan.exact else "about "
    lines = [f"features     {plan.features:,} to label ({plan.before:,} labelled before)"]
    if plan.begun:
        lines[0] += f"; {plan.begun:,} begun before, asked only what is still to be answered"
    if plan.skipped:
        lines.append(
            f"             {about}{plan.skipped:,} active too rarely or nearly everywhere, "
            "so left out"
        )
    if plan.given_up:
        lines.append(
            f"             {about}{plan.given_up:,} left out, whose answers could not be used: "
            "--retry-failed asks again"
        )
    lines += [
        f"requests     {about}{plan.requests:,}, if every answer can be used",
        f"prompt       about {plan.prompt_tokens:,} tokens",
        f"completion   about {plan.completion_tokens:,} tokens, at most "
        f"{plan.most_completion_tokens:,} (a model that reasons)",
    ]
    if plan.cost is None:
        lines.append("cost         unknown: tell --price-in and --price-out")
    else:
        lines.append(f"cost         about {plan.cost:,.4g}, at most {plan.most_cost:,.4g}")
    if model is None:
        lines.append(f"({MODEL} is not set: what a model has labelled already is not left out)")
    lines.append(
        f"(tokens are guessed from the letters of {plan.looked_at:,} features' prompts, not "
        "counted; nothing was sent)"
    )
    for line in lines:
        typer.echo(line)


def _features(
    database: Path, features: str | None, sample: int | None, seed: int
) -> list[int] | None:
    from r1sae_fast.features import FeatureDB
    from r1sae_fast.labels.select import select, some_of

    if features is None and sample is None:
        return None
    ranges = None if features is None else _parse(features)
    with FeatureDB(database) as db:
        if ranges is not None:
            select(db, [numbers[-1] for numbers in ranges])  # refuses what is too large
        chosen = select(db, None if ranges is None else [n for part in ranges for n in part])
    return chosen if sample is None else some_of(chosen, sample, seed)


def _parse(text: str) -> list[range]:
    """``3,17,100-199`` as ranges: nothing is counted out yet, whatever the numbers are."""
    found: list[range] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)):
            raise ValueError(f"--features: {part.strip()!r} is no feature or range; e.g. 3,100-199")
        numbers = range(int(first), int(last if dash else first) + 1)
        if not numbers:
            raise ValueError(
                f"--features: {part.strip()!r} goes backwards; expected {last}-{first}"
            )
        found.append(numbers)
    return found


def register(root: typer.Typer) -> None:
    """Adds the command to the root app."""
    root.command("label", rich_help_panel="The chain")(label)
