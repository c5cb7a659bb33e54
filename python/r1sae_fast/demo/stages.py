"""The stages of the demo. Each goes on where it was interrupted, and says in a line what it did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from r1sae_fast.demo.display import Report
from r1sae_fast.demo.findings import find
from r1sae_fast.demo.markdown import write_markdown
from r1sae_fast.demo.picture import write_picture
from r1sae_fast.demo.settings import DemoSettings
from r1sae_fast.demo.steps import Step, find_steps
from r1sae_fast.demo.traces import OwnTrace, corpus, held_out_traces, read_own, reason
from r1sae_fast.encode import encode_shards
from r1sae_fast.examples import Examples, collect_examples
from r1sae_fast.features import FeatureDB
from r1sae_fast.harvest import HarvestProgress, harvest
from r1sae_fast.r1 import LocalEngine
from r1sae_fast.sae import FastSAE
from r1sae_fast.shards import ActivationShards, CodeShards
from r1sae_fast.train import Metrics, train

_HARVEST_BATCH = 64


@dataclass
class Demo:
    """The demo's settings, its folder, and what lies in it."""

    settings: DemoSettings
    folder: Path

    @property
    def traces(self) -> Path:
        """What the model thought, a JSON line a trace."""
        return self.folder / "traces.jsonl"

    @property
    def activations(self) -> Path:
        """The corpus's residuals."""
        return self.folder / "activations"

    @property
    def held_out(self) -> Path:
        """The held-out traces' residuals."""
        return self.folder / "held-out" / "activations"

    @property
    def sae(self) -> Path:
        """The SAE, its metrics and checkpoint."""
        return self.folder / "sae"

    @property
    def codes(self) -> Path:
        """The corpus's codes."""
        return self.folder / "codes"

    @property
    def held_out_codes(self) -> Path:
        """The held-out traces' codes."""
        return self.folder / "held-out" / "codes"

    @property
    def examples(self) -> Path:
        """Each feature's strongest rows."""
        return self.folder / "examples.safetensors"

    @property
    def database(self) -> Path:
        """The feature database."""
        return self.folder / "features.ddb"

    @property
    def picture(self) -> Path:
        """Training curve, densities, detector."""
        return self.folder / "demo.png"

    @property
    def summary(self) -> Path:
        """All figures."""
        return self.folder / "summary.json"

    @property
    def report(self) -> Path:
        """The figures as a page."""
        return self.folder / "report.md"

    @cached_property
    def engine(self) -> LocalEngine:
        """The model; loaded when first needed."""
        return LocalEngine.from_pretrained(self.settings.model, dtype=torch.bfloat16)

    @cached_property
    def own(self) -> list[OwnTrace]:
        """What the model thought."""
        return read_own(self.traces)

    def decode(self, token: int) -> str:
        """The text of a token; none where the embedding is longer than the vocabulary."""
        return self._texts[token] if token < len(self._texts) else ""

    @cached_property
    def _texts(self) -> list[str]:
        tokenizer = self.engine.require_tokenizer()
        return [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]

    def own_steps(self) -> list[list[Step]]:
        """The steps of each of the model's own traces."""
        return [find_steps(one.tokens, self.decode) for one in self.own]

    def written_held_out(self) -> list[list[int]]:
        """The held-out traces."""
        settings = self.settings
        return held_out_traces(
            self.engine,
            self.own,
            count=settings.test_traces,
            seed=settings.seed + 1,
            slip_rate=settings.slip_rate,
        )


def stage_reason(demo: Demo, report: Report) -> str:
    """The model thinks about held-out problems."""
    settings = demo.settings
    report(0, 0, "loading TinyR1")
    own = reason(
        demo.engine,
        demo.traces,
        count=settings.own_traces,
        seed=settings.seed,
        report=lambda done, total: report(done, total, f"{done} of {total} traces"),
    )
    demo.own = own
    steps = [step for of_one in demo.own_steps() for step in of_one]
    tokens = sum(len(one.tokens) for one in own)
    right = sum(one.right for one in own) / len(own)
    return (
        f"{len(own)} held-out problems, {tokens:,} tokens at temperature 1: {right:.0%} right "
        f"answers, {sum(step.wrong for step in steps)} of {len(steps)} steps wrong"
    )


def stage_harvest(demo: Demo, report: Report) -> str:
    """Residuals of the corpus and of the held-out traces."""
    settings = demo.settings
    report(0, 0, "loading TinyR1")
    own_tokens = sum(len(one.tokens) for one in demo.own)
    # The model's own traces come first, and all of them, however small the corpus.
    budget = max(settings.corpus_tokens, own_tokens)
    texts = corpus(demo.engine, demo.own, seed=settings.seed, slip_rate=settings.slip_rate)
    done = _harvest(demo, texts, demo.activations, "corpus", budget, report, budget)
    held_out = demo.written_held_out()
    total = sum(map(len, held_out))
    _harvest(demo, held_out, demo.held_out, "held-out traces", total, report)
    size = sum(path.stat().st_size for path in ActivationShards(demo.activations).paths)
    return (
        f"residuals after layer {settings.layer} of {done.rows:,} tokens "
        f"({done.sequences:,} traces, {size / 1e6:,.0f} MB), and of {total:,} held-out ones"
    )


def _harvest(
    demo: Demo,
    texts: Iterable[list[int]],
    folder: Path,
    what: str,
    total: int,
    report: Report,
    budget: int | None = None,
) -> HarvestProgress:
    return harvest(
        demo.engine,
        texts,
        demo.settings.layer,
        folder,
        mode="prefill",
        batch_size=_HARVEST_BATCH,
        token_budget=budget,
        progress=lambda at: report(at.rows, total, f"{what}: {at.rows:,} of {total:,} tokens"),
    )


def stage_train(demo: Demo, report: Report) -> str:
    """The SAE."""
    config = demo.settings.training()

    def show(line: Metrics) -> None:
        note = f"FVU {line.fvu:.3f}, dead {line.dead_fraction:.0%}"
        report(line.step, config.steps, note)

    shards = ActivationShards(demo.activations)
    sae = train(shards, demo.sae, config, checkpoint_seconds=10, progress=False, on_metrics=show)
    return (
        f"{sae.d_in} to {sae.d_sae:,} features, k = {sae.k}, BatchTopK, on "
        f"{sae.metadata['tokens']:,} rows ({sae.metadata['tokens'] / len(shards):.1f} epochs)"
    )


def stage_encode(demo: Demo, report: Report) -> str:
    """Codes of both."""
    sae = FastSAE.load(demo.sae)
    found = []
    for what, source, folder in (
        ("corpus", demo.activations, demo.codes),
        ("held-out traces", demo.held_out, demo.held_out_codes),
    ):
        shards = ActivationShards(source)
        total = len(shards)
        found.append(
            encode_shards(
                sae,
                shards,
                folder,
                progress=False,
                on_rows=lambda rows, what=what, total=total: report(  # type: ignore[misc]  # mypy infers no default of a lambda
                    rows, total, f"{what}: {rows:,} of {total:,} rows"
                ),
            )
        )
    codes = found[0]
    mode, threshold = codes.metadata["mode"], codes.metadata.get("threshold")
    how = f"above {threshold:.3g}" if threshold is not None else f"mode {mode}"
    return f"{codes.nnz:,} codes {how}, {codes.nnz / len(codes):.1f} a token"


def stage_examples(demo: Demo, report: Report) -> str:
    """Each feature's strongest rows."""
    report(0, 0, "one pass over the codes")
    found = collect_examples(CodeShards(demo.codes), 20, progress=False)
    found.save(demo.examples)
    alive = int((found.counts > 0).sum())
    return f"the 20 strongest of each feature in one pass; {alive:,} of {found.d_sae:,} are alive"


def stage_features(demo: Demo, report: Report) -> str:
    """The database."""
    report(0, 0, "tokens, activations, labels")
    with FeatureDB.build(
        demo.database,
        CodeShards(demo.codes),
        Examples.load(demo.examples),
        demo.decode,
        {"model": demo.settings.model, "layer": demo.settings.layer, "demo": True},
        sae=FastSAE.load(demo.sae),
        overwrite=True,
        progress=False,
    ) as db:
        activations = db.sql("SELECT count(*) AS n FROM activations").to_pylist()[0]["n"]
    size = demo.database.stat().st_size / 1e6
    return f"{activations:,} activations with labels in one DuckDB file of {size:,.0f} MB"


def stage_report(demo: Demo, report: Report) -> str:
    """What was found: figures, picture, page."""
    report(0, 0, "evaluating")
    findings = find(demo)
    report(0, 0, "drawing")
    write_picture(findings, demo.picture)
    write_markdown(findings, demo.report)
    findings.save(demo.summary)
    return f"{demo.report.name}, {demo.summary.name}, {demo.picture.name}"
