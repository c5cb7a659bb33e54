"""What engines that run whole models share: residuals and taps."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from r1sae_fast.codes import SparseCodes
from r1sae_fast.r1.engines.generating import GeneratingEngine
from r1sae_fast.r1.generate import pad_right
from r1sae_fast.r1.segments import Segment
from r1sae_fast.r1.taps import Capture, Tap
from r1sae_fast.r1.taps.run import SegmentTracker, TapRun, make_call, needs_segments
from r1sae_fast.sae import FastSAE, Mode

TokenIds = Tensor | Sequence[Sequence[int]]
Lengths = Tensor | Sequence[int] | None


class TappedEngine(GeneratingEngine):
    """An engine whose forward can be tapped; see :mod:`r1sae_fast.r1.taps`."""

    def __init__(self) -> None:
        self._attached: tuple[Tap, ...] = ()

    # -- to be told by each engine ------------------------------------------------------------

    @abstractmethod
    def _forward(self, tokens: Tensor, layer: int, taps: TapRun | None) -> Tensor:
        """Residual stream [batch, seq, hidden] after block ``layer``, the last one that is run;
        ids are padded on the right by any valid id."""

    # -- taps ---------------------------------------------------------------------------------

    @property
    def attached(self) -> tuple[Tap, ...]:
        """The taps that :meth:`tap` has attached."""
        return self._attached

    @contextlib.contextmanager
    def tap(self, *taps: Tap) -> Iterator[tuple[Tap, ...]]:
        """Attaches taps to every call of this engine within a ``with`` block.

        They are applied in the order given, after those of an outer block. A :class:`Capture`
        holds what the last call read.

        Raises:
            ValueError: a point of a layer that does not exist or was not loaded.
        """
        before = self._attached
        self._attached = self._checked((*before, *taps))
        try:
            yield taps
        finally:
            self._attached = before

    def _checked(self, taps: Sequence[Tap]) -> tuple[Tap, ...]:
        for tap in taps:
            if not isinstance(tap, Tap):
                raise TypeError(
                    f"{tap!r} is no tap; expected Capture, AddDirection, SetFeatures or Apply"
                )
            try:
                self.check_layer(tap.point.layer)
            except ValueError as error:
                raise ValueError(f"{tap}: {error}") from None
        if len({id(tap) for tap in taps}) < len(taps):
            raise ValueError("a tap is attached twice; make a second one")
        return tuple(taps)

    def _tap_run(
        self,
        taps: Sequence[Tap],
        sequences: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int] | None,
        new: int | None,
    ) -> TapRun | None:
        """The taps prepared for a call; None where there are none."""
        taps = self._checked((*self._attached, *taps))
        if not taps:
            return None
        segments, trackers = [], []
        if needs_segments(taps):
            for number, tokens in enumerate(sequences):
                length = None if prompt_lengths is None else prompt_lengths[number]
                segments.append(self.segments(tokens, length))
            if new is not None:
                trackers = [self._tracker(known) for known in segments]
        lengths = [len(tokens) for tokens in sequences]
        call = make_call(self.hidden_size, self.dtype, self.device, lengths, new)
        return TapRun(taps, call, segments, trackers)

    def _tracker(self, segments: Sequence[int]) -> SegmentTracker:
        tokenizer = self.tokenizer
        return SegmentTracker(
            None if tokenizer is None else tokenizer.think_id,
            None if tokenizer is None else tokenizer.end_think_id,
            thinking=segments[-1] == Segment.THINKING,
        )

    @torch.no_grad()
    def run(
        self,
        token_ids: TokenIds,
        taps: Sequence[Tap] = (),
        *,
        lengths: Lengths = None,
        prompt_lengths: Sequence[int] | None = None,
        batch_size: int = 64,
    ) -> list[Tap]:
        """Reads sequences with these taps (and those attached); nothing is run after the last
        block that has one.

        Args:
            token_ids: ids, one list a sequence, of any lengths; or integers [batch, seq], padded
                on the right where ``lengths`` says so.
            taps: what to read and write.
            lengths: [batch], tokens of each sequence that are no padding.
            prompt_lengths: tokens of each sequence that the model did not write, for taps that
                choose by segments.
            batch_size: sequences that run together.

        Returns:
            ``taps``.

        Raises:
            ValueError: no taps, an empty sequence, and as for :meth:`residuals` and each tap.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        sequences = self._sequences(token_ids, lengths)
        run = self._tap_run(taps, sequences, prompt_lengths, None)
        if run is None:
            raise ValueError("there are no taps, so there is nothing to run for")
        for start in range(0, len(sequences), batch_size):
            batch = sequences[start : start + batch_size]
            run.first = start
            width = self.width_of(batch)
            run.begin(range(len(batch)), [0] * len(batch), batch, width=width)
            self._forward(pad_right(batch, self.device, width), run.layers[-1], run)
        run.finish()
        return list(taps)

    def _sequences(self, token_ids: TokenIds, lengths: Lengths) -> list[list[int]]:
        if isinstance(token_ids, Tensor) or lengths is not None:
            tokens, present = self._batch(token_ids, lengths)
            ids: list[list[int]] = tokens.tolist()
            counts: list[int] = present.sum(1).tolist()
            sequences = [row[:count] for row, count in zip(ids, counts, strict=True)]
        else:
            sequences = [list(map(int, row)) for row in token_ids]
        for number, tokens_ in enumerate(sequences):
            if not tokens_:
                raise ValueError(f"sequence {number} is empty: it needs at least one token")
            self.check_ids(tokens_)
        return sequences

    def codes(
        self,
        token_ids: TokenIds,
        layer: int,
        sae: FastSAE,
        lengths: Lengths = None,
        *,
        mode: Mode | None = None,
    ) -> SparseCodes:
        """The codes of the residual stream after block ``layer``: all that leaves the device.

        Args:
            token_ids, layer, lengths: as for :meth:`residuals`.
            sae: of this model's width, on the engine's device.
            mode: see :class:`Capture`. With "batch_topk", padding has no share in the choice.

        Returns:
            Codes of the leading shape [batch, seq]; none at padding.

        Raises:
            ValueError: as for :meth:`residuals` and :class:`Capture`.
        """
        from r1sae_fast.encode import with_empty_rows

        tokens, present = self._batch(token_ids, lengths)
        capture = Capture(layer, sae=sae, mode=mode)
        with self.tap(capture):
            self.residuals(tokens, layer, lengths)
        return with_empty_rows(capture.codes, present.flatten()).reshape(*tokens.shape)

    def _batch_taps(self, tokens: Tensor, present: Tensor) -> TapRun | None:
        """The attached taps, ready for one forward of a padded batch."""
        if not self._attached:
            return None
        ids: list[list[int]] = tokens.tolist()
        rows = [row[:n] for row, n in zip(ids, present.sum(1).tolist(), strict=True)]
        run = self._tap_run((), rows, None, None)
        if run is not None:
            run.begin(range(len(rows)), [0] * len(rows), rows, width=tokens.shape[1])
        return run

    # -- residuals ----------------------------------------------------------------------------

    def _batch(self, token_ids: TokenIds, lengths: Lengths) -> tuple[Tensor, Tensor]:
        """Checked ids [batch, seq] on the device, and which of them are no padding."""
        if not isinstance(token_ids, Tensor):
            if len({len(row) for row in token_ids}) > 1:
                raise ValueError(
                    "the sequences have unequal lengths; pad them on the right and give lengths="
                )
            token_ids = torch.tensor([list(row) for row in token_ids], dtype=torch.int64)
        if token_ids.ndim != 2 or token_ids.is_floating_point():
            raise ValueError(
                f"token_ids is {token_ids.dtype} {tuple(token_ids.shape)}, "
                "expected integers [batch, seq]"
            )
        token_ids = token_ids.to(self.device, torch.int64)
        batch, seq = token_ids.shape
        if token_ids.numel():
            if seq > self.context:
                raise ValueError(
                    f"the sequences have {seq} tokens, the model's context is {self.context}"
                )
            self.check_ids([int(token_ids.min()), int(token_ids.max())])
        if lengths is None:
            return token_ids, torch.ones_like(token_ids, dtype=torch.bool)
        lengths = torch.as_tensor(lengths, device=self.device)
        if lengths.shape != (batch,):
            raise ValueError(f"lengths has the shape {tuple(lengths.shape)}, expected ({batch},)")
        if batch and not bool(((lengths >= 0) & (lengths <= seq)).all()):
            raise ValueError(f"lengths must lie between 0 and {seq}, the width of token_ids")
        return token_ids, torch.arange(seq, device=self.device) < lengths[:, None]

    @torch.no_grad()
    def residuals(self, token_ids: TokenIds, layer: int, lengths: Lengths = None) -> Tensor:
        """The residual stream after block ``layer``, in one pass; later blocks are not run.

        The hook point is ``model.layers.{layer}`` (its output), layers counted from 0; in
        transformers' terms, ``hidden_states[layer + 1]``.

        Args:
            token_ids: integers [batch, seq], padded on the right where they are unequal.
            layer: 0 to the number of layers - 1.
            lengths: [batch], tokens of each sequence that are no padding.

        Returns:
            [batch, seq, hidden] in the engine's dtype; zeros at padding.

        Raises:
            ValueError: no such layer, sequences longer than the context, ids outside the
                vocabulary, shapes that do not fit, or an attached tap on a later layer.
        """
        self.check_layer(layer)
        tokens, present = self._batch(token_ids, lengths)
        for tap in self._attached:
            if tap.point.layer > layer:
                raise ValueError(f"{tap} is not reached: nothing is run after block {layer} here")
        run = self._batch_taps(tokens, present)
        if tokens.numel() == 0:
            return torch.zeros(
                *tokens.shape, self.hidden_size, dtype=self.dtype, device=self.device
            )
        residual = self._forward(torch.where(present, tokens, 0), layer, run)
        if run is not None:
            run.finish()
        return residual.masked_fill(~present[..., None], 0)
