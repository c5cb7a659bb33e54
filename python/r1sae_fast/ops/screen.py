"""Codes straight from x: all pre-activations bounded cheaply, the few that matter computed exactly.

The dense path multiplies in full precision and then throws all but k of d_sae products away. A
:class:`Screen` bounds them all with products of 8-bit numbers or of bfloat16 first, by a certified
margin (the proofs are in ``rust/core/src/screen/certificate.rs`` and ``coarse.rs``), drops what the
bounds exclude, and computes the rest exactly. Codes are then those of the exact pre-activations,
rounded once to float32: what the dense path aims at and misses by the errors of its sums.
(bfloat16: the product is rounded by way of float32, then the sum with the bias, as the dense path
does.)

On a GPU the screen is Triton's (float32 alone: bfloat16's tensor cores are as fast as screening),
and what takes its place without one makes no dense pre-activations either.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from r1sae_fast import _core
from r1sae_fast.codes import SparseCodes
from r1sae_fast.ops import _common, _device
from r1sae_fast.ops._gpu_screen import GpuScreen
from r1sae_fast.ops.choice import best_screen, choose
from r1sae_fast.ops.encode import (
    encode_batch_topk,
    encode_threshold,
    encode_topk,
    threshold_bounds,
)
from r1sae_fast.ops.row_changes import RowChanges

__all__ = ["SCREEN_KINDS", "Screen", "ScreenKind", "ScreenReport", "best_screen"]

ScreenKind = Literal["auto", "int8", "bf16", "none"]
SCREEN_KINDS: tuple[ScreenKind, ...] = get_args(ScreenKind)

# Rounding all weights costs as much as the dense codes of about this many rows.
_ROWS_OF_A_REFRESH = 64
_MOST_DIMENSIONS = 65_000
# The kinds of products, each with the other.
_OTHER: dict[str, str] = {"int8": "bf16", "bf16": "int8"}
_SEED_BITS = 128


class ScreenReport(NamedTuple):
    """What :meth:`Screen.explain` tells."""

    kind: str
    """``"int8"``, ``"bf16"`` or ``"none"``: what is in use for these rows."""
    kernel: str
    """The instructions of the products: ``amx_int8``, ``avx512_vnni``, ``avx_vnni``, ``avx2`` or
    ``scalar``; ``amx_bf16``, ``avx512_bf16``, ``avx2_bf16`` or ``scalar_bf16``; ``triton`` for a
    GPU's kernels, with a screen or without; else empty."""
    reason: str
    """Why this kind."""
    bytes: int
    """Of the rounded copy, as far as it was made."""
    rows: int
    """Encoded so far with the screen."""
    candidates: int
    """Exact products that these rows took."""
    exact_rows: int
    """Rows in which all features were computed exactly."""
    violations: int
    """Exact values that lay outside their certified bounds: 0, or the weights were changed in a way
    that torch doesn't see (``.data``). Such rows are computed exactly, but such a change need not
    show here: call :meth:`Screen.refresh` after it."""

    def __str__(self) -> str:
        kernel = f" ({self.kernel})" if self.kernel else ""
        text = f"screen: {self.kind}{kernel}: {self.reason}"
        if self.rows:
            text += (
                f"; {self.rows} rows so far, {self.candidates / self.rows:.1f} exact products each,"
                f" {self.exact_rows} computed whole, {self.violations} bounds violated"
            )
        return text


@dataclass
class Follower:
    """A screen's copy of the weights, lent to an optimiser (:meth:`Screen.following`)."""

    core: _core.Screen
    bias: Tensor
    """Of the features, as it is after the step."""
    followed: bool = False
    """Whether the step has brought the copy up to date."""


class Screen:
    """Encodes with one set of weights, on the CPU or a GPU.

    It follows changes of the weights as far as torch counts them (every in-place operation and
    optimizer): such weights are rounded again before they are used. Changes through ``.data`` or
    numpy need :meth:`refresh`. Calls from several threads take turns.

    Args:
        W_features: ``[d_sae, d_in]`` contiguous: the transpose of W_enc. Kept, not copied.
        b_enc: ``[d_sae]``. Kept, not copied.
        kind: ``"auto"`` chooses by size, dtype and CPU; ``"int8"`` screens by a copy of a byte a
            weight, with margins that fail with a probability below 1e-24; ``"bf16"`` (CPU alone) by
            one of two bytes, with margins that can't fail; ``"none"`` is the dense path.
        kernel: the CPU's instructions for the products; ``"auto"`` for the fastest.
        seed: of the CPU's rounding, 0 to 2^128 - 1; default drawn from the system. It shows in no
            code, only in :meth:`explain`'s counts. The certificate holds for data that were chosen
            without knowledge of it: give one where counts should repeat, not where a stranger
            chooses x.
        changes: what tells which features an optimiser has moved (see :class:`ops.RowChanges`), so
            that only those are rounded again.
        rows: about how many rows there will be at a time, where many are sure to come: ``"auto"``
            then screens smaller weights, too.

    Raises:
        TypeError: not a floating tensor.
        ValueError: shapes that don't fit, a kind that these weights can't have, or a seed out of
            range.
    """

    def __init__(
        self,
        W_features: Tensor,
        b_enc: Tensor,
        kind: ScreenKind = "auto",
        *,
        kernel: str = "auto",
        seed: int | None = None,
        changes: RowChanges | None = None,
        rows: int = 1,
    ) -> None:
        if seed is not None and not 0 <= seed < 1 << _SEED_BITS:
            raise ValueError(f"seed is {seed}; expected 0 to 2**{_SEED_BITS} - 1")
        if kind not in SCREEN_KINDS:
            raise ValueError(f"kind is {kind!r}; expected one of {', '.join(SCREEN_KINDS)}")
        if not (isinstance(W_features, Tensor) and W_features.is_floating_point()):
            raise TypeError("W_features is not a floating torch.Tensor")
        if W_features.dim() != 2 or tuple(b_enc.shape) != (W_features.shape[0],):
            raise ValueError(
                f"W_features has shape {tuple(W_features.shape)} and b_enc {tuple(b_enc.shape)}; "
                "expected [d_sae, d_in] and [d_sae]"
            )
        self._W, self._b = W_features.detach(), b_enc.detach()
        self.requested: ScreenKind = kind
        self._kernel = kernel
        self._seed = secrets.randbits(_SEED_BITS) if seed is None else seed
        self._changes = changes
        self._rows = rows
        self._copied_bias: Tensor | None = None
        self._core: _core.Screen | GpuScreen | None = None
        # The state of the weights that the 8-bit copy is of, and the last state seen.
        self._copied: tuple[int, ...] | None = None
        self._seen: tuple[int, ...] | None = None
        # A signal's handler may encode while its own thread is in here.
        self._lock = threading.RLock()
        if kind in _OTHER and kernel in _core.screen_kernels(_OTHER[kind])[1]:
            raise ValueError(f"kernel {kernel!r} is not one of {kind} products")
        problem = self._obstacle()
        if kind in _OTHER and problem is not None:
            raise ValueError(f"these weights can't be screened: {problem}")
        self.kind, self.reason = self._choose(problem)

    # -- the choice ---------------------------------------------------------------------------

    def _obstacle(self) -> str | None:
        """Why these weights can't be screened at all."""
        W, b = self._W, self._b
        if W.device != b.device or (W.device.type != "cpu" and not _device.on_gpu(W)):
            return f"they lie on {W.device} and {b.device}"
        if _device.on_gpu(W):
            if self.requested == "bf16":
                return "on a GPU screens are of 8-bit products alone"
            if W.dtype != torch.float32 or b.dtype != torch.float32:
                return f"they are {W.dtype}, whose products are as fast on a GPU as screening"
            if not _device.has_triton():
                return "triton is not installed"
        elif not _common.in_rust(W, b):
            return f"they are {W.dtype}; screens are for float32 and bfloat16"
        if not W.is_contiguous():
            return "they are not feature-major in memory"
        if W.is_inference() or b.is_inference():
            return "they are inference tensors, whose changes torch doesn't count"
        if W.shape[1] > _MOST_DIMENSIONS:
            return f"d_in is {W.shape[1]}, more than {_MOST_DIMENSIONS}"
        return None

    def _choose(self, problem: str | None) -> tuple[str, str]:
        if self.requested != "auto":
            return self.requested, "as asked for"
        if problem is not None:
            return "none", problem
        return choose(self._W, self._kernel, self._rows)

    def is_of(self, W_features: Tensor, b_enc: Tensor, kind: ScreenKind) -> bool:
        """Whether this is the screen of these very tensors."""

        def same(left: Tensor, right: Tensor) -> bool:
            kinds = (left.dtype, left.shape, left.stride(), left.device)
            return left.data_ptr() == right.data_ptr() and kinds == (
                right.dtype,
                right.shape,
                right.stride(),
                right.device,
            )

        return kind == self.requested and same(W_features, self._W) and same(b_enc, self._b)

    def explain(self) -> ScreenReport:
        """Which way codes are computed, why, and what it took so far."""
        core = self._core
        kernel = ""
        if self.kind in _OTHER:
            kernel = core.kernel if core is not None else self._kernel_name()
        elif _device.on_gpu(self._W) and _device.in_triton(self._W, self._b):
            kernel = "triton"
        counts = (0, 0, 0, 0) if core is None else core.counts
        size = 0 if core is None else core.nbytes
        return ScreenReport(self.kind, kernel, self.reason, size, *counts)

    def _kernel_name(self) -> str:
        if _device.on_gpu(self._W):
            return "triton"
        return _core.screen_kernels(self.kind)[0] if self._kernel == "auto" else self._kernel

    # -- the weights --------------------------------------------------------------------------

    def refresh(self, rows: Tensor | None = None) -> None:
        """Rounds weights that have changed (no work where there is no screen, or not yet).

        Args:
            rows: the features (int64) whose weights or biases changed; default all. Whoever gives
                them vouches that no others changed since the last call.

        Raises:
            ValueError: a row out of range.
        """
        with self._lock:
            if self._core is not None:
                # After an interrupted change nobody can vouch for the other rows.
                self._round(None if self._copied is None else rows)

    @contextmanager
    def following(self) -> Iterator[Follower | None]:
        """While it is open, the weights may be changed by one step of :func:`optim.update.update`
        that is given what this yields, and rounds them on its way, and the biases before it. None
        where there is no copy of the weights as they are, or not on the CPU. What else changes must
        be told to :meth:`refresh`, and all where the follower didn't follow."""
        with self._lock:
            core, copied = self._core, self._copied
            if not isinstance(core, _core.Screen) or copied != self._state():
                yield None
                return
            follower = Follower(core, self._b)
            self._copied = None
            try:
                yield follower
            except BaseException:
                # Half a step may have been rounded, by it or by a signal's handler that encoded.
                self._copied = None
                raise
            if not follower.followed:
                self._copied = copied
                return
            if self._changes is not None:
                self._copied_bias = self._b.clone()
            self._copied = self._seen = self._state()

    def _round(self, rows: Tensor | None) -> _core.Screen | GpuScreen:
        state = self._state()
        if _device.on_gpu(self._W):
            on_gpu = GpuScreen(self._W, self._b) if self._core is None else self._core
            assert isinstance(on_gpu, GpuScreen)
            on_gpu.refresh(rows)
            self._core = on_gpu
            self._copied = self._seen = state
            return on_gpu
        W, b = _common.to_rust(self._W), _common.to_rust(self._b)
        core = self._core
        assert not isinstance(core, GpuScreen)
        if core is None:
            threads = _common.threads(W.size)
            core = _core.Screen(W, b, self._kernel_name(), self._seed, threads)
            self._core = core
        else:
            self._copied = None  # should this be interrupted
            numbers = None if rows is None else rows.detach().cpu().to(torch.int64).contiguous()
            numpy = None if numbers is None else numbers.reshape(-1).numpy()
            core.refresh(W, b, numpy, _common.threads(W.size))
        if self._changes is not None:
            self._copied_bias = self._b.clone()
        self._copied = self._seen = state
        return core

    def _moved(self, state: tuple[int, ...]) -> Tensor | None:
        """The features that changed since the copy was made; None where nobody knows."""
        copied, changes, bias = self._copied, self._changes, self._copied_bias
        if copied is None or changes is None or bias is None or copied[::2] != state[::2]:
            return None
        rows = changes.take(copied[1], state[1])
        if rows is None or copied[3] == state[3]:
            return rows
        moved = self._b != bias
        moved[rows] = True
        return moved.nonzero().flatten()

    def _state(self) -> tuple[int, ...]:
        """Changes whenever torch knows that the weights did."""
        W, b = self._W, self._b
        return (W.data_ptr(), W._version, b.data_ptr(), b._version)

    def _ready(self, rows: int) -> _core.Screen | GpuScreen | None:
        """The screen of the weights as they are; None where a few rows of weights that change again
        and again are not worth it."""
        if self.kind not in _OTHER:
            return None
        with self._lock:
            core, state = self._core, self._state()
            if core is None or state != self._copied:
                # With gradients on, the weights may be about to change again.
                may_wait = self.requested == "auto" and torch.is_grad_enabled()
                if may_wait and rows < _ROWS_OF_A_REFRESH and state != self._seen:
                    self._seen = state
                    return None
                core = self._round(None if core is None else self._moved(state))
            # The dense path knows what to do with weights that hold NaN.
            return core if core.first_bad_feature is None else None

    # -- encoding -----------------------------------------------------------------------------

    def topk(self, x: Tensor, k: int, *, check_finite: bool = True) -> SparseCodes:
        """As :func:`ops.topk` of the pre-activations of ``x [..., d_in]``; no gradient flows (see
        :func:`ops.with_gradient`).

        Raises:
            TypeError, ValueError: x of another dtype or width than the weights; k out of range.
            NonFiniteError: names the (flat) row.
        """
        x = self._checked(x)
        _common.check_k(k, self._W.shape[0])
        screen = self._ready(_rows_of(x))
        if screen is None:
            return encode_topk(x, self._W, self._b, k, check_finite=check_finite)
        return self._encode(screen, x, "topk", k, check_finite)

    def batch_topk(self, x: Tensor, k: int, *, check_finite: bool = True) -> SparseCodes:
        """As :func:`ops.batch_topk` of the pre-activations of ``x``; see :meth:`topk`."""
        x = self._checked(x)
        _common.check_k(k, self._W.shape[0])
        screen = self._ready(_rows_of(x))
        if screen is None:
            return encode_batch_topk(x, self._W, self._b, k, check_finite=check_finite)
        return self._encode(screen, x, "batch_topk", k, check_finite)

    def threshold(
        self, x: Tensor, theta: Tensor | float, *, check_finite: bool = True
    ) -> SparseCodes:
        """As :func:`ops.threshold` of the pre-activations of ``x``; see :meth:`topk`."""
        x = self._checked(x)
        bounds = threshold_bounds(theta, self._W)
        screen = self._ready(_rows_of(x))
        if screen is None:
            return encode_threshold(x, self._W, self._b, theta, check_finite=check_finite)
        return self._encode(screen, x, "threshold", bounds, check_finite)

    def _checked(self, x: Tensor) -> Tensor:
        if x.dtype != self._W.dtype:
            raise TypeError(f"x is {x.dtype} but the weights {self._W.dtype}")
        if x.dim() == 0 or x.shape[-1] != self._W.shape[1]:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [..., {self._W.shape[1]}]")
        return x.detach()

    def _encode(
        self,
        screen: _core.Screen | GpuScreen,
        x: Tensor,
        rule: str,
        choice: int | Tensor,
        check_finite: bool,
    ) -> SparseCodes:
        flat = x.reshape(_rows_of(x), x.shape[-1])
        if isinstance(screen, GpuScreen):
            found = screen.encode(flat, rule, choice, check_finite)
        else:
            raw = screen.encode(
                _common.to_rust(flat),
                _common.to_rust(self._W),
                _common.to_rust(self._b),
                rule,
                choice.numpy() if isinstance(choice, Tensor) else choice,
                check_finite,
                _common.threads(max(self._W.numel(), len(flat) * self._W.shape[0])),
            )
            found = _common.raw_from_rust(raw)
        return SparseCodes(*found, self._W.shape[0], tuple(x.shape[:-1]))


def _rows_of(x: Tensor) -> int:
    return x.shape[:-1].numel()
