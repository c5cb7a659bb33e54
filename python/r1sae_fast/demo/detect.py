"""Which feature tells a wrong step from a right one, measured on steps that did not choose it.

The held-out traces are split in two by the number of their sequence. For each moment of a step the
feature with the largest AUROC on the even half is chosen, and its AUROC on the odd half is what is
reported, with a 95% interval from resampling whole traces. A linear probe on the raw residual,
fitted and measured on the same halves, says how much there was to be found.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1sae_fast.demo.steps import MOMENTS, Step
from r1sae_fast.shards import ActivationShards, CodeShards

_RESAMPLES = 1000


@dataclass(frozen=True)
class StepTable:
    """Steps of many sequences: the row of each moment, which are wrong, and whose they are."""

    rows: dict[str, Tensor]
    """For each of MOMENTS ``[steps]`` int64: rows of the shards."""
    wrong: Tensor
    """``[steps]`` bool."""
    sequence: Tensor
    """``[steps]`` int64."""

    @classmethod
    def of(cls, steps: list[list[Step]], lengths: list[int]) -> StepTable:
        """Of sequences that lie one after the other in the shards."""
        rows: dict[str, list[int]] = {moment: [] for moment in MOMENTS}
        wrong: list[bool] = []
        sequence: list[int] = []
        start = 0
        for number, (of_one, length) in enumerate(zip(steps, lengths, strict=True)):
            for step in of_one:
                for moment in MOMENTS:
                    rows[moment].append(start + step.places[moment])
                wrong.append(step.wrong)
                sequence.append(number)
            start += length
        as_tensor = {
            moment: torch.tensor(found, dtype=torch.int64) for moment, found in rows.items()
        }
        return cls(
            as_tensor,
            torch.tensor(wrong, dtype=torch.bool),
            torch.tensor(sequence, dtype=torch.int64),
        )

    def __len__(self) -> int:
        return self.wrong.shape[0]


@dataclass(frozen=True)
class Detector:
    """The feature that best tells wrong steps at a moment."""

    moment: str
    feature: int
    auroc: float
    """On the half that did not choose it."""
    low: float
    high: float
    """Ends of the 95% interval."""
    auroc_where_chosen: float
    probe_auroc: float
    """Of a linear probe on the raw residual, on the same half."""
    wrong: int
    right: int
    """Steps of the half that it is measured on."""
    fires_on_wrong: float
    fires_on_right: float
    """Share of these on which the feature fires."""
    own_auroc: float | None = None
    """On steps that the model wrote itself; None where too few of them are wrong."""
    own_wrong: int = 0
    own_right: int = 0


def auroc(values: Tensor, wrong: Tensor) -> Tensor:
    """The probability that a wrong step has the larger value, ties counted half.

    Args:
        values: ``[steps, columns]``.
        wrong: ``[steps]`` bool.

    Returns:
        ``[columns]`` float64; NaN where all steps are of one kind.
    """
    of_wrong = values[wrong].T.contiguous()
    of_right = values[~wrong].T.contiguous().sort(dim=1).values
    below = torch.searchsorted(of_right, of_wrong, side="left").double()
    upto = torch.searchsorted(of_right, of_wrong, side="right").double()
    return ((below + upto) / 2).mean(dim=1) / of_right.shape[1]


def detect(
    codes: CodeShards,
    activations: ActivationShards,
    table: StepTable,
    own_codes: CodeShards,
    own: StepTable,
    *,
    seed: int,
    least: int = 10,
) -> list[Detector]:
    """The best detector at each moment; none for one with fewer than ``least`` steps of a kind
    in a half.

    Args:
        codes: of the held-out traces, row for row as ``activations``.
        activations: of the same.
        table: the steps of these.
        own_codes: codes among which are those of the model's own traces.
        own: the steps of these.
        seed: of the resampling.
        least: see above.
    """
    choosing = table.sequence % 2 == 0
    halves = (choosing, ~choosing)
    if (
        min(int((half & kind).sum()) for half in halves for kind in (table.wrong, ~table.wrong))
        < least
    ):
        return []
    found = []
    for moment in MOMENTS:
        dense = codes[table.rows[moment]].codes.to_dense()
        scores = auroc(dense[choosing], table.wrong[choosing])
        feature = int(scores.argmax())
        values, wrong = dense[~choosing, feature], table.wrong[~choosing]
        low, high = _interval(values, wrong, table.sequence[~choosing], seed)
        raw = activations[table.rows[moment]].activations.float()
        found.append(
            Detector(
                moment=moment,
                feature=feature,
                auroc=float(auroc(values[:, None], wrong)),
                low=low,
                high=high,
                auroc_where_chosen=float(scores[feature]),
                probe_auroc=_probe(raw, table.wrong, choosing),
                wrong=int(wrong.sum()),
                right=int((~wrong).sum()),
                fires_on_wrong=float((values[wrong] > 0).float().mean()),
                fires_on_right=float((values[~wrong] > 0).float().mean()),
                own_auroc=_on_own(own_codes, own, moment, feature, least),
                own_wrong=int(own.wrong.sum()),
                own_right=int((~own.wrong).sum()),
            )
        )
    return found


def strengths(codes: CodeShards, rows: Tensor, feature: int) -> Tensor:
    """A feature's strength at each of ``rows``, 0 where it is silent."""
    return codes[rows].codes.to_dense()[:, feature]


def _on_own(
    codes: CodeShards, own: StepTable, moment: str, feature: int, least: int
) -> float | None:
    if min(int(own.wrong.sum()), int((~own.wrong).sum())) < least:
        return None
    values = strengths(codes, own.rows[moment], feature)
    return float(auroc(values[:, None], own.wrong))


def _interval(values: Tensor, wrong: Tensor, sequence: Tensor, seed: int) -> tuple[float, float]:
    """95% by the bootstrap over sequences: the steps of one trace are not independent."""
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(sequence.numpy() == number) for number in set(sequence.tolist())]
    flat, kinds = values.double().numpy(), wrong.numpy()
    results: list[float] = []
    for _ in range(_RESAMPLES):
        chosen = rng.integers(len(groups), size=len(groups))
        steps = np.concatenate([groups[i] for i in chosen])
        of_wrong, of_right = flat[steps][kinds[steps]], np.sort(flat[steps][~kinds[steps]])
        if len(of_wrong) and len(of_right):
            results.append(_auroc_1d(of_wrong, of_right))
    low, high = np.percentile(results, [2.5, 97.5])
    return float(low), float(high)


def _auroc_1d(of_wrong: NDArray[np.float64], sorted_right: NDArray[np.float64]) -> float:
    below = np.searchsorted(sorted_right, of_wrong, side="left")
    upto = np.searchsorted(sorted_right, of_wrong, side="right")
    return float(((below + upto) / 2).mean() / len(sorted_right))


def _probe(raw: Tensor, wrong: Tensor, fitting: Tensor) -> float:
    """AUROC on the other half of a ridge regression of "wrong" on the residual."""
    x = raw.double()
    x = x - x[fitting].mean(0)
    x = x / x[fitting].norm(dim=1).mean()
    target = wrong[fitting].double()
    target = target - target.mean()
    gram = x[fitting].T @ x[fitting]
    # A hundredth of the mean eigenvalue: some steadiness with few steps and many dimensions.
    ridge = 1e-2 * gram.diagonal().mean() * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram + ridge, x[fitting].T @ target)
    return float(auroc((x[~fitting] @ weights)[:, None], wrong[~fitting]))
