"""What goes on in place of the residual stream: functions for the tap :class:`Apply`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from r1sae_fast.errors import NonFiniteError
from r1sae_fast.evals.figures import DENSE_ABOVE, Figures
from r1sae_fast.evals.sums import SEGMENTS, Sums
from r1sae_fast.r1.engines.tapped import TappedEngine
from r1sae_fast.r1.taps.selection import choose_attached_mode, selecting
from r1sae_fast.sae import FastSAE, Mode

Change = Callable[[Tensor], Tensor]
"""From values ``[n, d_in]`` to what replaces them."""


def attached_modes(saes: Sequence[FastSAE], engine: TappedEngine, mode: Mode | None) -> list[Mode]:
    """How each SAE chooses its codes inside this model.

    Raises:
        ValueError: no SAEs, another width or device than the model's, or a mode that is not to be
            had; where there are several SAEs, the one is named.
    """
    if not saes:
        raise ValueError("there are no SAEs; expected at least one")
    names = [f"SAE {number} of {len(saes)}: " for number in range(1, len(saes) + 1)]
    if len(saes) == 1:
        names = [""]
    return [_attached_mode(sae, engine, mode, name) for sae, name in zip(saes, names, strict=True)]


def _attached_mode(sae: FastSAE, engine: TappedEngine, mode: Mode | None, name: str) -> Mode:
    if sae.transcoder:
        raise ValueError(
            f"{name}this is a transcoder, which does not make the residual stream again that it "
            "reads; inside a model only autoencoders are evaluated: give --shards and --targets"
        )
    if sae.d_in != engine.hidden_size:
        raise ValueError(
            f"{name}the SAE has d_in {sae.d_in}, the model {engine.name} a residual stream of "
            f"{engine.hidden_size}; give an SAE of this model"
        )
    if sae.device.type != engine.device.type:
        raise ValueError(
            f"{name}the SAE lies on {sae.device}, the engine on {engine.device}; "
            f"use sae.to({str(engine.device)!r})"
        )
    try:
        return choose_attached_mode(sae, mode)
    except ValueError as error:
        raise ValueError(f"{name}{error}") from None


class ReplaceBy:
    """One vector ``[d_in]`` in place of every value with a norm within ``limit``."""

    def __init__(self, vector: Tensor, limit: float) -> None:
        self.vector = vector
        self.limit = limit

    def __call__(self, values: Tensor) -> Tensor:
        keep = within(values, self.limit)
        return torch.where(keep[:, None], self.vector.to(values.dtype), values)


class Splice:
    """The SAE's reconstruction in place of every value with a norm within ``limit``.

    Sums up, by the way, how good it is; see :meth:`figures`.
    """

    def __init__(self, sae: FastSAE, mode: Mode, limit: float) -> None:
        self.sae = sae
        self.mode = mode
        self.limit = limit
        self._sums = Sums(sae.d_in, sae.d_sae, sae.device)

    @torch.no_grad()
    def __call__(self, values: Tensor) -> Tensor:
        keep = within(values, self.limit)
        whole = bool(keep.all())
        x = values if whole else values[keep]
        if x.shape[0] == 0:
            return values
        try:
            with selecting(self.sae, self.mode):
                reconstruction, codes = self.sae(x)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"in the model: {error}; the checkpoint is damaged, or its numbers leave the range "
                "of this dtype: try float32"
            ) from None
        unknown = torch.full((x.shape[0],), len(SEGMENTS) - 1, dtype=torch.int64)
        self._sums.add(x, reconstruction, codes, unknown)
        replaced: Tensor = reconstruction.to(values.dtype)
        if whole:
            return replaced
        return values.index_copy(0, keep.nonzero().flatten(), replaced)

    def figures(self) -> Figures:
        """Of all values that were replaced so far."""
        return self._sums.figures(None, DENSE_ABOVE)


def within(values: Tensor, limit: float) -> Tensor:
    """Which values ``[n, d_in]`` have a norm of at most ``limit``; those with a NaN too."""
    beyond: Tensor = values.float().norm(dim=1) > limit
    return ~beyond
