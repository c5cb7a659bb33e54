"""Writing: what goes on in place of the values at a point."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from r1sae_fast.errors import NonFiniteError
from r1sae_fast.r1.taps.selection import choose_attached_mode, selecting
from r1sae_fast.r1.taps.tap import Call, Tap
from r1sae_fast.r1.taps.where import Forward, Ints, Positions, Segments, make_where
from r1sae_fast.sae import FastSAE, Mode

Strength = float | Sequence[float]
"""One for all sequences, or one for each of the call's."""


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What edits are computed in, so that they are rounded once."""
    return torch.promote_types(dtype, torch.float32)


class Edit(Tap):
    """An edit of chosen tokens; all others go on to the bit.

    It is applied to every token that a forward reads, in a prefill and in each step of a
    generation alike, and to what later taps and later layers see.

    Args:
        point: name (see :func:`parse_point`), or a layer's number for its output.
        start: only from this position on; one for all, or one for each sequence. A token's value
            decides the token after it: to steer the whole of an answer, begin with the last
            token of the prompt.
        sequences: only these, counted from 0 within the call; the others run on unedited.
        positions, segments: only these; see :class:`Capture`.
    """

    def __init__(
        self,
        point: str | int,
        *,
        start: int | Sequence[int] = 0,
        sequences: Iterable[int] | None = None,
        positions: Positions = None,
        segments: Segments = None,
    ) -> None:
        where = make_where(positions=positions, segments=segments, sequences=sequences, start=start)
        super().__init__(point, where)

    def visit(self, value: Tensor, forward: Forward) -> Tensor:
        index = forward.index(self.where)
        if not len(index):
            return value
        return index.put(value, self.edited(index.of(value), index.sequence))

    @abstractmethod
    def edited(self, values: Tensor, sequences: Ints) -> Tensor:
        """The new values of chosen tokens, [n, d_in] in the dtype of ``values`` [n, d_in], which
        are not to be written to; ``sequences`` [n] says which sequence each is of."""

    def _strengths(self, name: str, strength: Strength) -> tuple[float, ...]:
        values = tuple(map(float, np.atleast_1d(np.asarray(strength, dtype=np.float64))))
        if not np.isfinite(values).all():
            raise NonFiniteError(f"{self}: {name} is {strength}, expected finite numbers")
        return values

    def _check_strengths(self, name: str, strengths: tuple[float, ...], call: Call) -> None:
        if len(strengths) not in (1, call.count):
            raise ValueError(
                f"{self}: {name} has {len(strengths)} entries, expected 1 or one for each of "
                f"{call.count} sequences"
            )


class AddDirection(Edit):
    """Adds ``strength * direction`` to the values.

    Args:
        point: see :class:`Edit`, also for the other choices of tokens.
        direction: [d_in], on the engine's device; used as it is, whatever its norm.
        strength: one for all, or one for each sequence.

    Raises:
        NonFiniteError: the direction or a strength holds a NaN or an infinity.
        ValueError: the direction is no vector of the model's width, or elsewhere.
    """

    def __init__(
        self,
        point: str | int,
        direction: Tensor,
        strength: Strength = 1.0,
        *,
        start: int | Sequence[int] = 0,
        sequences: Iterable[int] | None = None,
        positions: Positions = None,
        segments: Segments = None,
    ) -> None:
        super().__init__(
            point, start=start, sequences=sequences, positions=positions, segments=segments
        )
        direction = torch.as_tensor(direction).detach()
        if direction.dim() != 1 or not direction.is_floating_point():
            raise ValueError(
                f"{self}: direction is {direction.dtype} {tuple(direction.shape)}, "
                "expected floating [d_in]"
            )
        if not bool(direction.isfinite().all()):
            raise NonFiniteError(f"{self}: direction holds a NaN or an infinity")
        self.direction = direction
        self.strength = self._strengths("strength", strength)
        self._added = direction  # strength * direction, [1 or sequences, d_in]

    def start(self, call: Call) -> None:
        super().start(call)
        if self.direction.shape[0] != call.hidden_size:
            raise ValueError(
                f"{self}: direction has {self.direction.shape[0]} entries, the model a residual "
                f"stream of {call.hidden_size}"
            )
        self._require_device("direction", self.direction.device, "direction", call)
        self._check_strengths("strength", self.strength, call)
        wide = _wide(torch.promote_types(self.direction.dtype, call.dtype))
        strengths = torch.tensor(self.strength, dtype=wide, device=call.device)
        self._added = strengths[:, None] * self.direction.to(wide)

    def edited(self, values: Tensor, sequences: Ints) -> Tensor:
        added = self._added
        if len(self.strength) > 1:
            added = added[torch.from_numpy(sequences.copy()).to(values.device)]
        return (values + added).to(values.dtype)


class SetFeatures(Edit):
    """Sets the strength of features, and leaves all else of the value, the SAE's error included.

    ``value + (target - current) * W_dec[feature]``, summed over the features: what decoding the
    codes with the targets in place of the current strengths, plus the error of decoding the codes
    as they were, comes to.

    Args:
        point: see :class:`Edit`, also for the other choices of tokens.
        sae: of the model's width, on the engine's device.
        targets: strength by feature; each one for all, or one for each sequence. 0 turns a
            feature off.
        mode: how the current strength is told. "topk", "batch_topk" and "threshold": it is the
            feature's code in that mode of the SAE, 0 where it is not chosen; "relu": the positive
            part of the pre-activation, chosen or not. Default: as for :class:`Capture`. "topk"
            and "batch_topk" encode the value with all features, the others only with these.

    Raises:
        ValueError: no features, no such feature, a transcoder, or a mode that would depend on the
            batch.
        NonFiniteError: a target that is not finite.
    """

    def __init__(
        self,
        point: str | int,
        sae: FastSAE,
        targets: Mapping[int, Strength],
        *,
        mode: Mode | Literal["relu"] | None = None,
        start: int | Sequence[int] = 0,
        sequences: Iterable[int] | None = None,
        positions: Positions = None,
        segments: Segments = None,
    ) -> None:
        super().__init__(
            point, start=start, sequences=sequences, positions=positions, segments=segments
        )
        if not targets:
            raise ValueError(f"{self}: no features to set; expected at least one")
        for feature in targets:
            if not isinstance(feature, int) or not 0 <= feature < sae.d_sae:
                raise ValueError(
                    f"{self}: feature {feature!r} does not exist: the SAE has 0 to {sae.d_sae - 1}"
                )
        if sae.transcoder:
            raise ValueError(
                f"{self}: this is a transcoder, whose directions are of another point than the one "
                "it reads; add them there by AddDirection, or give an autoencoder"
            )
        self.sae = sae
        self.mode = mode if mode == "relu" else choose_attached_mode(sae, mode)
        self.features = list(targets)
        self.targets = [
            self._strengths(f"the target of feature {feature}", target)
            for feature, target in targets.items()
        ]

    def start(self, call: Call) -> None:
        super().start(call)
        self._require_sae(self.sae, call)
        for feature, target in zip(self.features, self.targets, strict=True):
            self._check_strengths(f"the target of feature {feature}", target, call)
        wide = _wide(torch.promote_types(self.sae.dtype, call.dtype))
        each = any(len(target) > 1 for target in self.targets)
        rows = [
            target * call.count if each and len(target) == 1 else target for target in self.targets
        ]
        self._targets = torch.tensor(rows, dtype=wide, device=call.device).T  # [1 or n, features]
        at = torch.tensor(self.features, device=call.device)
        with torch.no_grad():
            self._decoder = self.sae.W_dec[at].to(wide)
            self._encoder = self.sae.W_enc[:, at]
            self._bias = self.sae.b_enc[at]
            threshold = self.sae.threshold
            self._threshold = threshold if threshold.dim() == 0 else threshold[at]

    @torch.no_grad()
    def current(self, values: Tensor) -> Tensor:
        """The features' strengths as they are: [n, features] from [n, d_in]."""
        if self.mode == "relu" or self.mode == "threshold":
            strengths = (values.to(self.sae.dtype) @ self._encoder + self._bias).relu()
            if self.mode == "threshold":
                strengths = strengths.where(strengths > self._threshold, 0)
            return strengths
        with selecting(self.sae, self.mode):
            codes = self.sae.encode_sparse(values)
        strengths = values.new_zeros((values.shape[0], len(self.features)), dtype=codes.dtype)
        rows = codes.row_ids
        for place, feature in enumerate(self.features):
            here = codes.indices == feature
            strengths[rows[here], place] = codes.values[here]
        return strengths

    def edited(self, values: Tensor, sequences: Ints) -> Tensor:
        targets = self._targets
        if targets.shape[0] > 1:
            targets = targets[torch.from_numpy(sequences.copy()).to(values.device)]
        change = (targets - self.current(values).to(targets.dtype)) @ self._decoder
        return (values + change).to(values.dtype)


class Apply(Edit):
    """Any function of the values.

    Args:
        point: see :class:`Edit`, also for the other choices of tokens.
        function: from values [n, d_in] to values of the same shape, in any floating dtype; it
            must not write to what it is given. Rows are of several sequences and positions.
    """

    def __init__(
        self,
        point: str | int,
        function: Callable[[Tensor], Tensor],
        *,
        start: int | Sequence[int] = 0,
        sequences: Iterable[int] | None = None,
        positions: Positions = None,
        segments: Segments = None,
    ) -> None:
        super().__init__(
            point, start=start, sequences=sequences, positions=positions, segments=segments
        )
        self.function = function

    def edited(self, values: Tensor, sequences: Ints) -> Tensor:
        result = self.function(values)
        if not isinstance(result, Tensor) or result.shape != values.shape:
            shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(
                f"{self}: the function gave {shape}, expected a tensor {tuple(values.shape)}"
            )
        return result.to(values.dtype)
