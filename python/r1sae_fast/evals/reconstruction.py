"""How well an SAE reconstructs activations, and how its features are used: one pass over shards."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from r1sae_fast.encode import choose_mode
from r1sae_fast.evals.figures import DENSE_ABOVE, Reconstruction
from r1sae_fast.evals.sums import SEGMENTS, Sums, segment_places
from r1sae_fast.progress import progress_bar
from r1sae_fast.r1.taps.selection import selecting
from r1sae_fast.sae import FastSAE, Mode
from r1sae_fast.shards import ActivationBatch, ActivationShards, PairedBatch, PairedShards

__all__ = ["OUTLIER_FACTOR", "evaluate_reconstruction", "find_norm_limit"]

OUTLIER_FACTOR = 10.0
_SAMPLE_NUMBERS = 1 << 25
_SAMPLE_ROWS = 16384


@torch.no_grad()
def evaluate_reconstruction(
    sae: FastSAE,
    shards: ActivationShards | PairedShards | str | os.PathLike[str],
    *,
    mode: Mode | None = None,
    batch_rows: int = 4096,
    max_rows: int | None = None,
    norm_limit: float | None = None,
    dense_above: float = DENSE_ABOVE,
    progress: bool | None = None,
) -> Reconstruction:
    """FVU, L0, densities, cosines ... of ``sae``, over all rows and by segment.

    Memory does not grow with the rows. Rows that hold a NaN or an infinity are left out and
    counted, and so are outliers, a few of which can hold most of the variance.

    Args:
        sae: on any device; left as it was.
        shards: what to measure on; best rows that were not trained on. For a transcoder
            :class:`~r1sae_fast.shards.PairedShards`: all figures are then relative to the targets.
        mode: how codes are chosen; default the SAE's own, but "threshold" instead of "batch_topk"
            where it is calibrated.
        batch_rows: rows at a time; in mode "batch_topk" this has a say in the codes.
        max_rows: at most so many, drawn from all; default all, in order.
        norm_limit: leave out rows of a larger norm (``math.inf``: none). Default: what training
            left out, as the SAE's metadata tell, else 10 times the median norm of a sample.
        dense_above: density from which on a feature is called dense.
        progress: show a bar on stderr; default if that is a terminal.

    Raises:
        ValueError: another d_in, no rows to count, a mode "threshold" without a threshold, or an
            argument out of range.
        NonFiniteError: the SAE's own weights hold NaN or infinities.
    """
    if not isinstance(shards, (ActivationShards, PairedShards)):
        shards = ActivationShards(shards)
    require_kind(sae, isinstance(shards, PairedShards))
    if shards.d_in != sae.d_in:
        raise ValueError(
            f"{shards.folder}: the shards have d_in = {shards.d_in}, the SAE {sae.d_in}; "
            "give activations of the layer it was trained on"
        )
    chosen = choose_mode(sae, mode)
    if chosen == "threshold":
        chosen = choose_mode(sae, chosen)  # its own mode, and there is none
    for name, value in (("batch_rows", batch_rows), ("max_rows", max_rows)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    if not 0.0 <= dense_above <= 1.0:
        raise ValueError(f"dense_above is {dense_above}; expected a share of the rows, 0 to 1")
    if len(shards) == 0:
        raise ValueError(f"{shards.folder}: no rows to evaluate on; harvest some first")
    limit = find_norm_limit(sae, shards) if norm_limit is None else check_norm_limit(norm_limit)
    total = len(shards) if max_rows is None else min(max_rows, len(shards))
    aim_limit = math.inf if limit == math.inf else _target_limit(sae, shards)
    sums = Sums(sae.d_in, sae.d_sae, sae.device)
    outliers = non_finite = seen = 0
    with (
        selecting(sae, chosen),
        progress_bar("evaluating", total, unit="rows", shown=progress) as shown,
    ):
        for batch in _batches(shards, batch_rows, total):
            finite, norms = norms_of(batch.activations[: total - seen])
            seen += norms.shape[0]
            keep = finite & (norms <= limit)
            aims = batch.targets[: keep.shape[0]] if isinstance(batch, PairedBatch) else None
            if aims is not None:
                also, norms = norms_of(aims)
                finite = finite & also
                keep &= also & (norms <= aim_limit)
            non_finite += int((~finite).sum())
            outliers += int((finite & ~keep).sum())
            x = batch.activations[: keep.shape[0]]
            places = segment_places(batch.segment[: keep.shape[0]])
            if not bool(keep.all()):
                x, places = x[keep], places[keep]
                aims = None if aims is None else aims[keep]
            if x.shape[0]:
                x = x.to(sae.device)
                reconstruction, codes = sae(x)
                sums.add(x if aims is None else aims.to(sae.device), reconstruction, codes, places)
            shown(seen)
    if sums.rows == 0:
        raise ValueError(
            f"{shards.folder}: no rows to evaluate on: of {seen:,}, {non_finite:,} hold NaN or "
            f"infinities and {outliers:,} have a norm above {limit:g}"
        )
    by_segment = {name: sums.figures(place, dense_above) for place, name in enumerate(SEGMENTS)}
    return Reconstruction(
        **sums.fields(None, dense_above),
        segments={name: figures for name, figures in by_segment.items() if figures.rows},
        mode=chosen,
        norm_limit=limit,
        outliers=outliers,
        non_finite=non_finite,
    )


def require_kind(sae: FastSAE, paired: bool) -> None:
    """Raises ValueError for a transcoder without targets, or targets without one."""
    if sae.transcoder and not paired:
        raise ValueError(
            "this is a transcoder, which makes another activation of what it reads; give pairs "
            "(PairedShards(inputs, targets); on the command line --targets FOLDER)"
        )
    if paired and not sae.transcoder:
        raise ValueError("there are targets, but this SAE is no transcoder; leave them out")


def _target_limit(sae: FastSAE, shards: ActivationShards | PairedShards) -> float:
    if not isinstance(shards, PairedShards):
        return math.inf
    told = sae.metadata.get("target_norm_limit")
    return _sampled_limit(shards.targets) if told is None else float(told)


def find_norm_limit(sae: FastSAE, shards: ActivationShards | PairedShards | None) -> float:
    """The norm above which rows are left out: what training left out, as the SAE's metadata tell;
    else 10 times the median norm of a sample of ``shards``; else (None) infinite."""
    told = sae.metadata.get("norm_limit")
    if told is not None:
        return float(told)
    if shards is None or len(shards) == 0:
        return math.inf
    return _sampled_limit(shards)


def _sampled_limit(shards: ActivationShards | PairedShards) -> float:
    rows = max(1, min(len(shards), _SAMPLE_ROWS, _SAMPLE_NUMBERS // shards.d_in))
    finite, norms = norms_of(next(iter(shards.loader(rows, shuffle=True, prefetch=0))).activations)
    return float(norms[finite].median()) * OUTLIER_FACTOR if bool(finite.any()) else math.inf


def check_norm_limit(limit: float) -> float:
    """``limit``, or ValueError."""
    if not limit > 0:
        raise ValueError(f"norm_limit is {limit}; expected a norm above 0 (inf: leave out no row)")
    return float(limit)


def norms_of(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows ``[n, d_in]`` are finite, and their norms, float32 ``[n]``."""
    norms = rows.float().norm(dim=1)
    finite = norms.isfinite()
    if not bool(finite.all()):
        # A norm may overflow though every number is finite.
        finite = finite | rows.isfinite().all(1)
    return finite, norms


def _batches(
    shards: ActivationShards | PairedShards, batch_rows: int, total: int
) -> Iterator[ActivationBatch]:
    """Batches until ``total`` rows are reached; the last may hold more."""
    seen = 0
    for batch in shards.loader(min(batch_rows, total), shuffle=total < len(shards)):
        yield batch
        seen += len(batch)
        if seen >= total:
            return
