"""What a demo found: figures, features and traces, as ``summary.json`` keeps them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from r1sae_fast.atomic import write_bytes
from r1sae_fast.demo.detect import Detector, StepTable, detect, strengths
from r1sae_fast.demo.steps import Step, find_steps
from r1sae_fast.features import FeatureDB
from r1sae_fast.r1.segments import Segment
from r1sae_fast.sae import FastSAE
from r1sae_fast.shards import ActivationShards, CodeShards
from r1sae_fast.train import evaluate
from r1sae_fast.train.metrics import FILE as METRICS
from r1sae_fast.train.metrics import read_lines

if TYPE_CHECKING:
    from r1sae_fast.demo.stages import Demo

_FEATURES = 6
_CONTEXTS = 3
_WINDOW = 8


@dataclass(frozen=True)
class Piece:
    """A token of a text that is shown."""

    text: str
    segment: str
    """prompt, thinking or response."""
    mark: str = ""
    """"wrong": the result of a wrong step; "wait": the model's "Wait"."""
    strength: float = 0.0
    """Of the headline detector, relative to its strongest in the corpus."""


@dataclass(frozen=True)
class Trace:
    """A trace in which a slip is noticed."""

    own: bool
    """Whether the model wrote all of it; else the slip was planted."""
    right: bool
    """Whether it ends with the right answer."""
    pieces: list[Piece]


@dataclass(frozen=True)
class Context:
    """A place where a feature is strong: tokens, their strengths, and which of them it is."""

    tokens: list[str]
    strengths: list[float]
    hit: int


@dataclass(frozen=True)
class Feature:
    """A feature to be shown."""

    feature: int
    label: str
    """Counted, not interpreted."""
    clarity: float
    count: int
    density: float
    largest: float
    contexts: list[Context]


@dataclass(frozen=True)
class Findings:
    """Everything that the demo shows."""

    settings: dict[str, Any]
    reasoning: dict[str, float]
    """Of the model's own traces: right answers, steps, wrong ones, and how often "Wait" follows."""
    trace: Trace | None
    sae: dict[str, float]
    features: list[Feature]
    detectors: list[Detector]
    headline: int
    """Which of :attr:`detectors` is shown first and drawn; see :func:`headline_of`."""
    detector_features: list[Feature]
    """The features of :attr:`detectors`, each once."""
    training: list[dict[str, float]]
    """Metrics: tokens, fvu, dead_fraction."""
    density: list[float]
    """Of each feature on the held-out traces."""
    wrong_strengths: list[float]
    right_strengths: list[float]
    """Of the headline detector, on the half of the steps that it is measured on."""

    @property
    def first(self) -> Detector | None:
        """The headline detector."""
        return self.detectors[self.headline] if self.detectors else None

    def save(self, path: Path) -> None:
        """Writes ``summary.json``."""
        write_bytes(path, (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Findings:
        """Reads it."""
        data = json.loads(path.read_text(encoding="utf-8"))
        trace = data["trace"]
        if trace is not None:
            trace = Trace(**{**trace, "pieces": [Piece(**piece) for piece in trace["pieces"]]})
        features = {
            name: [
                Feature(**{**one, "contexts": [Context(**c) for c in one["contexts"]]})
                for one in data[name]
            ]
            for name in ("features", "detector_features")
        }
        detectors = [Detector(**one) for one in data["detectors"]]
        return cls(**{**data, **features, "trace": trace, "detectors": detectors})


def find(demo: Demo) -> Findings:
    """Evaluates, measures and chooses; everything before the ``report`` stage must be there."""
    codes, activations = CodeShards(demo.held_out_codes), ActivationShards(demo.held_out)
    corpus_codes = CodeShards(demo.codes)
    texts = demo.written_held_out()
    steps = [find_steps(tokens, demo.decode) for tokens in texts]
    table = StepTable.of(steps, [len(tokens) for tokens in texts])
    own_steps = demo.own_steps()
    own = StepTable.of(own_steps, [len(one.tokens) for one in demo.own])
    detectors = detect(codes, activations, table, corpus_codes, own, seed=demo.settings.seed)
    headline = headline_of(detectors)
    first = detectors[headline] if detectors else None
    wrong, right = _strengths_by_kind(codes, table, first)
    sae, density = _sae_figures(demo, activations, corpus_codes)
    with FeatureDB(demo.database) as db:
        features = [_feature(db, number) for number in clearest(db, _FEATURES)]
        chosen = dict.fromkeys(detector.feature for detector in detectors)
        detector_features = [_feature(db, number) for number in chosen]
    return Findings(
        settings=demo.settings.to_dict(),
        reasoning=_reasoning(demo, own_steps),
        trace=_choose_trace(demo, own_steps, first, detector_features),
        sae=sae,
        features=features,
        detectors=detectors,
        headline=headline,
        detector_features=detector_features,
        training=[
            {name: line[name] for name in ("tokens", "fvu", "dead_fraction")}
            for line in read_lines(demo.sae / METRICS)
            if line["fvu"] is not None
        ],
        density=density,
        wrong_strengths=wrong,
        right_strengths=right,
    )


def headline_of(detectors: list[Detector]) -> int:
    """The first moment at which a feature surely knows (the interval of its AUROC lies above 0.9);
    if none does, the moment of the largest AUROC."""
    sure = [place for place, one in enumerate(detectors) if one.low > 0.9]
    if sure or not detectors:
        return sure[0] if sure else 0
    return max(range(len(detectors)), key=lambda place: detectors[place].auroc)


def _strengths_by_kind(
    codes: CodeShards, table: StepTable, first: Detector | None
) -> tuple[list[float], list[float]]:
    if first is None:
        return [], []
    half = table.sequence % 2 == 1
    found = strengths(codes, table.rows[first.moment][half], first.feature)
    wrong = table.wrong[half]
    return found[wrong].tolist(), found[~wrong].tolist()


def _sae_figures(
    demo: Demo, held_out: ActivationShards, corpus_codes: CodeShards
) -> tuple[dict[str, float], list[float]]:
    sae = FastSAE.load(demo.sae)
    batch = evaluate(sae, held_out, progress=False)
    sae.mode = "threshold"
    alone = evaluate(sae, held_out, progress=False)
    fired = torch.zeros(sae.d_sae, dtype=torch.int64)
    for part in corpus_codes.iter_batches(1 << 16):
        fired += torch.bincount(part.codes.indices, minlength=sae.d_sae)
    figures = {
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "rows": alone.rows,
        "left_out": alone.left_out,
        "threshold": float(sae.threshold),
        "fvu": alone.fvu,
        "l0": alone.l0,
        "dead_fraction": alone.dead_fraction,
        "fvu_batch_topk": batch.fvu,
        "l0_batch_topk": batch.l0,
        "dead_in_corpus": float((fired == 0).double().mean()),
        "corpus_rows": len(corpus_codes),
    }
    return figures, alone.density.tolist()


def _reasoning(demo: Demo, own_steps: list[list[Step]]) -> dict[str, float]:
    steps = [step for of_one in own_steps for step in of_one]
    wrong = [step for step in steps if step.wrong]
    right = [step for step in steps if not step.wrong]
    return {
        "traces": len(demo.own),
        "right_answers": sum(one.right for one in demo.own) / max(len(demo.own), 1),
        "steps": len(steps),
        "wrong_steps": len(wrong),
        "waited_after_wrong": sum(step.waited for step in wrong) / max(len(wrong), 1),
        "waited_after_right": sum(step.waited for step in right) / max(len(right), 1),
    }


def _choose_trace(
    demo: Demo,
    own_steps: list[list[Step]],
    first: Detector | None,
    detector_features: list[Feature],
) -> Trace | None:
    """The shortest own trace that slips once, notices and ends well; else the nearest to that."""
    candidates = [
        (not one.right, sum(step.wrong for step in steps), len(one.tokens), number)
        for number, (one, steps) in enumerate(zip(demo.own, own_steps, strict=True))
        if any(step.wrong and step.waited for step in steps)
        and all(step.wrong == step.waited for step in steps)
    ]
    if candidates:
        number = min(candidates)[-1]
        one, steps = demo.own[number], own_steps[number]
        start = sum(len(other.tokens) for other in demo.own[:number])
        return _trace(
            demo, one.tokens, steps, CodeShards(demo.codes), start, first, detector_features,
            own=True, right=one.right,
        )  # fmt: skip
    start = 0
    for tokens in demo.written_held_out():
        steps = find_steps(tokens, demo.decode)
        if sum(step.wrong for step in steps) == 1:
            return _trace(
                demo, tokens, steps, CodeShards(demo.held_out_codes), start, first,
                detector_features, own=False, right=True,
            )  # fmt: skip
        start += len(tokens)
    return None


def _trace(
    demo: Demo,
    tokens: list[int],
    steps: list[Step],
    codes: CodeShards,
    start: int,
    first: Detector | None,
    detector_features: list[Feature],
    *,
    own: bool,
    right: bool,
) -> Trace:
    marks = {step.places["result"]: "wrong" for step in steps if step.wrong}
    marks |= {step.places["verdict"] + 1: "wait" for step in steps if step.waited}
    relative = [0.0] * len(tokens)
    if first is not None:
        largest = next(f.largest for f in detector_features if f.feature == first.feature)
        rows = torch.arange(start, start + len(tokens))
        found = strengths(codes, rows, first.feature)
        relative = (found / largest).tolist() if largest > 0 else relative
    segments = demo.engine.segments(tokens)
    return Trace(
        own,
        right,
        [
            Piece(
                demo.decode(token),
                Segment(segment).name.lower(),
                marks.get(place, ""),
                round(strength, 4),
            )
            for place, (token, segment, strength) in enumerate(
                zip(tokens, segments, relative, strict=True)
            )
        ],
    )


def clearest(db: FeatureDB, count: int) -> list[int]:
    """Features with the clearest labels, no two about the same token, and of different kinds."""
    rows = db.sql("""
        SELECT f.feature_id, f.clarity, t.token_offset, t.decoded_token
        FROM features f JOIN token_lift t USING (feature_id)
        WHERE f.count >= 30 AND t.rank = 1
        QUALIFY row_number() OVER (PARTITION BY f.feature_id ORDER BY t.score DESC) = 1
        ORDER BY f.clarity DESC, f.count DESC, f.feature_id""").to_pylist()
    chosen: list[int] = []
    seen: set[str] = set()
    kinds: dict[str, int] = {}
    for row in rows:
        text = row["decoded_token"] or ""
        kind = _kind(text)
        # Numbers are half of the vocabulary, and would be half of the table.
        if text in seen or kinds.get(kind, 0) >= max(1, count // 3):
            continue
        seen.add(text)
        kinds[kind] = kinds.get(kind, 0) + 1
        chosen.append(row["feature_id"])
        if len(chosen) == count:
            break
    return chosen


def _kind(token: str) -> str:
    word = token.strip()
    if word.isdigit():
        return "number"
    if not word or not word[0].isalpha():
        return "sign"
    return "name" if word[0].isupper() else "word"


def _feature(db: FeatureDB, number: int) -> Feature:
    summary = db.feature(number)
    contexts = [
        Context(
            [token.text or f"[{token.token}]" for token in example.context],
            [round(float(token.strength), 4) for token in example.context],
            next(i for i, t in enumerate(example.context) if t.token_idx == example.token_idx),
        )
        for example in db.top(number, _CONTEXTS, _WINDOW, per_sequence=1)
    ]
    return Feature(
        number,
        summary.labels[0].label if summary.labels else "",
        float(summary.clarity or 0.0),
        summary.count,
        float(summary.density or 0.0),
        float(summary.max),
        contexts,
    )


__all__ = ["Context", "Feature", "Findings", "Piece", "Trace", "clearest", "find"]
