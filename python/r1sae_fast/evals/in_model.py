"""What becomes of the model's predictions when an SAE's reconstruction stands in for the residual
stream, compared with leaving it alone and with wiping it out.

Bricken et al., "Towards Monosemanticity" (2023); "loss recovered" of Gao et al., arXiv:2406.04093,
and of Rajamanoharan et al., arXiv:2404.16014.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from r1sae_fast.evals.losses import cross_entropies, divergences
from r1sae_fast.evals.reconstruction import OUTLIER_FACTOR, check_norm_limit
from r1sae_fast.evals.splice import Change, ReplaceBy, Splice, attached_modes
from r1sae_fast.evals.sums import SEGMENTS
from r1sae_fast.harvest.sequences import HarvestSequence, read_given
from r1sae_fast.progress import progress_bar
from r1sae_fast.prompts import Item
from r1sae_fast.r1 import HfEngine, LocalEngine
from r1sae_fast.r1.segments import Segment
from r1sae_fast.r1.taps import Apply
from r1sae_fast.sae import FastSAE, Mode

__all__ = ["InModel", "Losses", "evaluate_all_in_model", "evaluate_in_model"]

LogitsEngine = LocalEngine | HfEngine


@dataclass(frozen=True)
class Losses:
    """Means over a set of predicted tokens, each given all tokens before it; in nats a token.

    ``*_clean``: the model undisturbed. ``*_sae``: the residual stream at the hook point is
    replaced, at all positions, by the SAE's reconstruction of it; ``*_zero``: by zeros;
    ``*_mean``: by its mean over all positions of these texts.
    """

    tokens: int
    """Tokens that were predicted."""
    ce_clean: float
    """Cross-entropy: mean of ``-log p(token)``."""
    ce_sae: float
    ce_zero: float
    ce_mean: float
    kl_sae: float
    """Mean of ``KL(p_clean || p_sae)`` over the vocabulary."""
    kl_zero: float
    kl_mean: float

    @property
    def ce_recovered_zero(self) -> float:
        """``(ce_zero - ce_sae) / (ce_zero - ce_clean)``: 1 for an SAE that changes nothing, 0 for
        one that gives zeros, below 0 for a worse one; NaN where zeros do no harm."""
        return _recovered(self.ce_zero, self.ce_sae, self.ce_clean)

    @property
    def ce_recovered_mean(self) -> float:
        """The same against the mean: ``(ce_mean - ce_sae) / (ce_mean - ce_clean)``."""
        return _recovered(self.ce_mean, self.ce_sae, self.ce_clean)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        own = {field: getattr(self, field) for field in Losses.__dataclass_fields__}
        return {
            **own,
            "ce_recovered_zero": self.ce_recovered_zero,
            "ce_recovered_mean": self.ce_recovered_mean,
        }


@dataclass(frozen=True)
class InModel(Losses):
    """Over all predicted tokens, and by the segment that each is of."""

    segments: dict[str, Losses]
    """"prompt", "thinking", "response", "unknown": those with tokens."""
    point: str
    """Where the SAE stood in."""
    mode: Mode
    """How its codes were chosen."""
    sequences: int
    """Texts that were read."""
    positions: int
    """Positions that were replaced; the last of a text too, which predicts none of its tokens."""
    left_out: int
    """Positions whose residual was left as it is, in all three, for its norm."""
    norm_limit: float
    """Residuals of a larger norm were left as they are; infinite where none were."""
    fvu: float
    """Of the SAE on the residuals that it replaced."""
    l0: float
    """Its mean codes a position."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        rest = {
            name: value
            for name, value in asdict(self).items()
            if name not in Losses.__dataclass_fields__
        }
        segments = {name: losses.to_json() for name, losses in self.segments.items()}
        return {**super().to_json(), **rest, "segments": segments}


def evaluate_in_model(
    sae: FastSAE,
    engine: LogitsEngine,
    texts: Iterable[Item],
    layer: int,
    *,
    mode: Mode | None = None,
    batch_size: int = 8,
    norm_limit: float | None = None,
    progress: bool | None = None,
) -> InModel:
    """Cross-entropy with the SAE in place of the residual stream, and how much that recovers.

    Four forwards a batch (undisturbed, SAE, zeros, mean), and before them one up to ``layer``, for
    the mean.

    Args:
        sae: of the model's width, on the engine's device; left as it was.
        engine: with its head, that is loaded without ``last_layer``.
        texts: as ``harvest`` takes them in mode "prefill": texts, conversations (prompt and
            answer: the segments are told from these), or token ids. Kept in memory, as token ids.
        layer: the hook point is ``model.layers.{layer}``, its output.
        mode: how codes are chosen; default the SAE's own, but "threshold" instead of
            "batch_topk", which must be asked for, as codes then depend on the batch.
        batch_size: texts that run together; the logits of two runs are in memory at a time,
            ``2 * batch_size * length * vocabulary * 4`` bytes.
        norm_limit: residuals of a larger norm (attention sinks) are left as they are, by SAE and
            ablations alike (``math.inf``: none). Default: what training left out, as the SAE's
            metadata tell, else 10 times the median norm in the first batch.
        progress: show a bar on stderr; default if that is a terminal.

    Raises:
        ValueError: no such layer, another d_in or device, no text of two tokens or more, a mode
            that is not to be had, an argument out of range.
        NonFiniteError: the residual stream holds NaN or infinities.
    """
    (found,) = evaluate_all_in_model(
        [sae],
        engine,
        texts,
        layer,
        mode=mode,
        batch_size=batch_size,
        norm_limit=norm_limit,
        progress=progress,
    )
    return found


@torch.no_grad()
def evaluate_all_in_model(
    saes: Sequence[FastSAE],
    engine: LogitsEngine,
    texts: Iterable[Item],
    layer: int,
    *,
    mode: Mode | None = None,
    batch_size: int = 8,
    norm_limit: float | None = None,
    progress: bool | None = None,
) -> list[InModel]:
    """:func:`evaluate_in_model` of several SAEs on the same texts and positions: undisturbed run
    and ablations are run once for all.

    Args:
        mode: one for all; default each one's default.
        norm_limit: one for all; default the smallest that any SAE's metadata tell, else as there.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    engine.check_layer(layer)
    engine.check_head()
    chosen = attached_modes(saes, engine, mode)
    told = [float(sae.metadata["norm_limit"]) for sae in saes if "norm_limit" in sae.metadata]
    if norm_limit is None and told:
        norm_limit = min(told)
    limit = None if norm_limit is None else check_norm_limit(norm_limit)
    sequences = [
        sequence
        for number, item in enumerate(texts)
        if len((sequence := read_given(engine, item, number)).tokens) > 1
    ]
    if not sequences:
        raise ValueError("there is no text of two tokens or more, so there is nothing to predict")
    batches = [sequences[i : i + batch_size] for i in range(0, len(sequences), batch_size)]
    with progress_bar("in the model", 2 * len(batches), unit="batches", shown=progress) as shown:
        mean, limit, left_out = _mean_residual(engine, batches, layer, limit, shown)
        splices = [Splice(sae, own, limit) for sae, own in zip(saes, chosen, strict=True)]
        changes: list[Change] = [
            *splices,
            ReplaceBy(torch.zeros_like(mean), limit),
            ReplaceBy(mean, limit),
        ]
        totals = _Totals(len(changes))
        for done, batch in enumerate(batches, 1):
            _add_batch(totals, engine, batch, layer, changes)
            shown(len(batches) + done)
    return [
        _result(totals, number, splice, layer, len(sequences), left_out)
        for number, splice in enumerate(splices)
    ]


class _Totals:
    """Sums by segment, float64: cross-entropies of the undisturbed run, then cross-entropy and
    divergence of each change."""

    def __init__(self, changes: int) -> None:
        self.tokens = torch.zeros(len(SEGMENTS), dtype=torch.int64)
        self.clean = torch.zeros(len(SEGMENTS), dtype=torch.float64)
        self.ce = torch.zeros(changes, len(SEGMENTS), dtype=torch.float64)
        self.kl = torch.zeros(changes, len(SEGMENTS), dtype=torch.float64)

    def losses(self, number: int, segment: int | None) -> dict[str, Any]:
        """The arguments of :class:`Losses`, for the change of this number (an SAE)."""
        chosen = slice(None) if segment is None else slice(segment, segment + 1)
        tokens = int(self.tokens[chosen].sum())

        def mean(sums: Tensor) -> float:
            return float(sums[chosen].sum()) / tokens if tokens else math.nan

        return {
            "tokens": tokens,
            "ce_clean": mean(self.clean),
            "ce_sae": mean(self.ce[number]),
            "ce_zero": mean(self.ce[-2]),
            "ce_mean": mean(self.ce[-1]),
            "kl_sae": mean(self.kl[number]),
            "kl_zero": mean(self.kl[-2]),
            "kl_mean": mean(self.kl[-1]),
        }


def _mean_residual(
    engine: LogitsEngine,
    batches: Sequence[Sequence[HarvestSequence]],
    layer: int,
    limit: float | None,
    shown: Callable[[float], None],
) -> tuple[Tensor, float, int]:
    """Mean of the residuals ``[d_in]`` within the limit, float64; the limit; how many exceed it."""
    total = torch.zeros(engine.hidden_size, dtype=torch.float64, device=engine.device)
    rows = left_out = 0
    for done, batch in enumerate(batches, 1):
        tokens = [sequence.tokens for sequence in batch]
        for _, residuals in engine.rows(tokens, layer, batch_size=len(tokens)):
            norms = residuals.float().norm(dim=1)
            if limit is None:
                limit = float(norms.median()) * OUTLIER_FACTOR
                limit = limit if limit > 0 else math.inf
            # A NaN is kept, and met with an error that names it when it comes to the SAE.
            keep = ~(norms > limit)
            total += residuals[keep].double().sum(0)
            rows += int(keep.sum())
            left_out += int((~keep).sum())
        shown(done)
    assert limit is not None  # there is a batch
    if rows == 0:
        raise ValueError(
            f"each of {left_out} residuals after layer {layer} has a norm above {limit:g}, so "
            "there is nothing to replace; is this the layer that the SAE was trained on?"
        )
    return total / rows, limit, left_out


def _add_batch(
    totals: _Totals,
    engine: LogitsEngine,
    batch: Sequence[HarvestSequence],
    layer: int,
    changes: Sequence[Change],
) -> None:
    places = torch.tensor(
        [
            SEGMENTS.index(Segment(segment).name.lower())
            for sequence in batch
            for segment in sequence.segments[1:]
        ]
    )
    targets = torch.tensor([token for sequence in batch for token in sequence.tokens[1:]])
    targets = targets.to(engine.device)
    count = len(SEGMENTS)

    def by_segment(values: Tensor) -> Tensor:
        return torch.bincount(places, values.cpu(), minlength=count)

    clean = _predictions(engine, batch)
    totals.tokens += torch.bincount(places, minlength=count)
    totals.clean += by_segment(cross_entropies(clean, targets))
    for number, change in enumerate(changes):
        with engine.tap(Apply(layer, change)):
            logits = _predictions(engine, batch)
        totals.ce[number] += by_segment(cross_entropies(logits, targets))
        totals.kl[number] += by_segment(divergences(clean, logits))


def _predictions(engine: LogitsEngine, batch: Sequence[HarvestSequence]) -> Tensor:
    """Logits ``[n, vocab]`` at every position but each text's last, one text after another."""
    lengths = [len(sequence.tokens) for sequence in batch]
    width = max(lengths)
    padded = [sequence.tokens + [0] * (width - len(sequence.tokens)) for sequence in batch]
    logits = engine.logits(padded, lengths)
    return torch.cat(list(_rows(logits, lengths)))


def _rows(logits: Tensor, lengths: Sequence[int]) -> Iterator[Tensor]:
    for row, length in zip(logits, lengths, strict=True):
        yield row[: length - 1]


def _result(
    totals: _Totals, number: int, splice: Splice, layer: int, sequences: int, left_out: int
) -> InModel:
    by_segment = {
        name: Losses(**totals.losses(number, place)) for place, name in enumerate(SEGMENTS)
    }
    figures = splice.figures()
    return InModel(
        **totals.losses(number, None),
        segments={name: losses for name, losses in by_segment.items() if losses.tokens},
        point=f"model.layers.{layer}",
        mode=splice.mode,
        sequences=sequences,
        positions=figures.rows,
        left_out=left_out,
        norm_limit=splice.limit,
        fvu=figures.fvu,
        l0=figures.l0,
    )


def _recovered(ablated: float, spliced: float, clean: float) -> float:
    return (ablated - spliced) / (ablated - clean) if ablated != clean else math.nan
