"""Reading the values at a point, or the codes that an SAE makes of them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from r1sae_fast.codes import SparseCodes
from r1sae_fast.errors import NonFiniteError
from r1sae_fast.r1.taps.selection import choose_attached_mode, selecting
from r1sae_fast.r1.taps.tap import Call, Tap
from r1sae_fast.r1.taps.where import Forward, Index, Positions, Segments, make_where
from r1sae_fast.sae import FastSAE, Mode

_TOGETHER = 512


def _rows(waiting: tuple[Tensor, Index]) -> int:
    return waiting[0].shape[0]


class Capture(Tap):
    """Copies the values at a point into a buffer on the engine's device, a row a token.

    What it holds is of the engine's last call and stays until the next. Rows come as the engine
    runs: of a prefill in the order of sequences and positions, of a generation the prompts' and
    then a row a sequence each step; :attr:`sequence` and :attr:`position` say whose they are. The
    last token that a sequence writes is read by no forward and so has no row.

    Args:
        point: name (see :func:`parse_point`), or a layer's number for its output.
        positions: only these: a slice; a list of positions for all sequences (-1 is the last
            one, not while generating); or a list of lists, one for each sequence.
        segments: only tokens of these: "prompt", "thinking", "response". While text is generated,
            each new token is judged by those before it.
        sequences: only these, counted from 0 within the call.
        start: only from this position on; one for all, or one for each sequence.
        sae: encode the values where they are, and keep only :attr:`codes`.
        mode: the SAE's; default its own, "threshold" instead of "batch_topk". With "batch_topk"
            codes depend on the tokens that run together, so it must be asked for.
        dtype: of the buffer; default the engine's. Not with ``sae``.
        out: the buffer itself, [capacity, d_in] on the engine's device; default: made by the
            first call, larger where need be, and used again.

    Raises:
        ValueError: no such point, segment or mode, or arguments that exclude each other.
    """

    def __init__(
        self,
        point: str | int,
        *,
        positions: Positions = None,
        segments: Segments = None,
        sequences: Iterable[int] | None = None,
        start: int | list[int] = 0,
        sae: FastSAE | None = None,
        mode: Mode | None = None,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> None:
        where = make_where(positions=positions, segments=segments, sequences=sequences, start=start)
        super().__init__(point, where)
        if sae is None and mode is not None:
            raise ValueError(f"{self}: mode is of an SAE, but there is none")
        if sae is not None and (dtype is not None or out is not None):
            raise ValueError(f"{self}: with an SAE there is no buffer for dtype or out to describe")
        if out is not None and (out.dim() != 2 or not out.is_contiguous() or dtype is not None):
            raise ValueError(
                f"{self}: out is {tuple(out.shape)}, expected a contiguous [capacity, d_in] "
                "(and no dtype, which is its own)"
            )
        self.sae = sae
        self.mode = None if sae is None else choose_attached_mode(sae, mode)
        self._dtype = dtype
        self._buffer = out
        self._given = out is not None
        self._rows = 0
        self._codes: list[SparseCodes] = []
        self._waiting: list[tuple[Tensor, Index]] = []
        self._indices: list[Index] = []

    def start(self, call: Call) -> None:
        super().start(call)
        self._rows = 0
        self._codes, self._waiting, self._indices = [], [], []
        if self.sae is not None:
            self._require_sae(self.sae, call)
            return
        buffer = self._buffer
        if self._given and buffer is not None:
            self._require_device("out", buffer.device, "out", call)
            if buffer.shape[1] != call.hidden_size:
                raise ValueError(
                    f"{self}: out has the width {buffer.shape[1]}, expected {call.hidden_size}"
                )
            return
        dtype = self._dtype or call.dtype
        if (
            buffer is None
            or (buffer.dtype, buffer.device) != (dtype, call.device)
            or buffer.shape[1] != call.hidden_size
        ):
            self._buffer = torch.empty((0, call.hidden_size), dtype=dtype, device=call.device)
        if self.where.chooses_all:
            self._reserve(call.expected)

    def _reserve(self, rows: int) -> Tensor:
        assert self._buffer is not None  # start() has made it
        capacity = self._buffer.shape[0]
        if rows > capacity:
            if self._given:
                raise ValueError(
                    f"{self}: out has room for {capacity} rows, and at least {rows} came; "
                    "give a larger one"
                )
            grown = self._buffer.new_empty((max(rows, 2 * capacity), self._buffer.shape[1]))
            grown[: self._rows] = self._buffer[: self._rows]
            self._buffer = grown
        return self._buffer

    def visit(self, value: Tensor, forward: Forward) -> Tensor:
        index = forward.index(self.where)
        if len(index):
            self._indices.append(index)
            if self.sae is None:
                self._copy(value, index)
            else:
                self._waiting.append((index.of(value), index))
                # Rows stand alone in all other modes; a step's few are encoded with the next ones'.
                if self.mode == "batch_topk" or sum(map(_rows, self._waiting)) >= _TOGETHER:
                    self.finish()
        return value

    def finish(self) -> None:
        if self.sae is not None and self._waiting:
            waiting, self._waiting = self._waiting, []
            self._encode(self.sae, waiting)

    def _copy(self, value: Tensor, index: Index) -> None:
        stop = self._rows + len(index)
        target = self._reserve(stop)[self._rows : stop]
        if index.rows is None:
            target.view_as(value).copy_(value)
        elif target.dtype == value.dtype:
            torch.index_select(value.flatten(0, 1), 0, index.rows, out=target)
        else:
            target.copy_(index.of(value))
        self._rows = stop

    @torch.no_grad()
    def _encode(self, sae: FastSAE, waiting: list[tuple[Tensor, Index]]) -> None:
        assert self.mode is not None
        rows = torch.cat([rows for rows, _ in waiting]) if len(waiting) > 1 else waiting[0][0]
        try:
            with selecting(sae, self.mode):
                self._codes.append(sae.encode_sparse(rows))
        except NonFiniteError:
            bad = torch.isfinite(rows).all(1).logical_not().nonzero()
            if not len(bad):
                raise  # the SAE's own weights
            row = int(bad[0])
            position = self._column([index.position for _, index in waiting])[row]
            sequence = self._column([index.sequence for _, index in waiting])[row]
            raise NonFiniteError(
                f"{self}: the value holds a NaN or an infinity at position {position} "
                f"of sequence {sequence}; the checkpoint is damaged, or its numbers "
                "leave the range of this dtype: try float32"
            ) from None

    # -- what was read ------------------------------------------------------------------------

    @property
    def values(self) -> Tensor:
        """[n, d_in]: a view of the buffer, which the next call writes over; ``clone()`` to keep.

        Raises:
            ValueError: with an SAE, which leaves :attr:`codes` only.
        """
        if self.sae is not None:
            raise ValueError(f"{self}: only codes leave an attached SAE; see .codes")
        if self._buffer is None:
            raise ValueError(f"{self}: nothing was run yet")
        return self._buffer[: self._rows]

    @property
    def codes(self) -> SparseCodes:
        """Of n rows, those of :attr:`sequence` and :attr:`position`.

        Raises:
            ValueError: without an SAE.
        """
        if self.sae is None:
            raise ValueError(f"{self}: no SAE is attached; give sae=, or see .values")
        self.finish()  # a call that was interrupted did not
        if not self._codes:
            return self.sae.encode_sparse(self.sae.W_dec.new_empty((0, self.sae.d_in)))
        if len(self._codes) > 1:
            self._codes = [SparseCodes.cat(self._codes)]
        return self._codes[0]

    @property
    def sequence(self) -> Tensor:
        """Number of each row's sequence, within the call: int64 [n] on the CPU."""
        return self._column([index.sequence for index in self._indices])

    @property
    def position(self) -> Tensor:
        """Of each row's token in its sequence: int64 [n] on the CPU."""
        return self._column([index.position for index in self._indices])

    @staticmethod
    def _column(parts: list[np.ndarray[tuple[int, ...], np.dtype[np.int64]]]) -> Tensor:
        return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts]))

    def of(self, sequence: int) -> Tensor:
        """The values of one sequence, in the order of positions: [n, d_in], a copy."""
        here = (self.sequence == sequence).nonzero().flatten()
        return self.values[here.to(self.values.device)]

    def __len__(self) -> int:
        return sum(map(len, self._indices))
