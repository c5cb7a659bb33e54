"""FastSAE: a sparse autoencoder whose codes stay sparse.

``pre_activations = x @ W_enc + b_enc`` (``b_dec`` is not subtracted, as in Goodfire's release),
``codes = select(relu(pre_activations))``, ``reconstruction = codes @ W_dec + b_dec``; a transcoder
makes another activation that way, with a skip connection ``+ x @ W_skip.T``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from r1sae_fast import ops
from r1sae_fast.codes import SparseCodes
from r1sae_fast.errors import NonFiniteError
from r1sae_fast.ops import _device
from r1sae_fast.ops._memory import empty_weights
from r1sae_fast.optim.factored import Leave, leave_at
from r1sae_fast.sae.checks import check_input, check_parameters, explained
from r1sae_fast.sae.config import Mode, SaeConfig, check_dtype

__all__ = ["FastSAE"]

_UNSET = -1.0


class FastSAE(nn.Module):
    """A sparse autoencoder.

    Args:
        d_in: width of the activations.
        d_sae: number of features.
        k: codes a row (topk), on average (batch_topk, over all leading positions together), or
            the number that :meth:`calibrate_threshold` aims at (threshold).
        mode: ``"topk"``, ``"batch_topk"`` or ``"threshold"``; may be changed later, as may k.
        tied: W_enc is W_dec transposed, one storage.
        transcoder: it makes another activation of the same token, not x again.
        skip_connection: of a transcoder: it has W_skip.
        check_finite: refuse x that holds NaN or infinities, naming the row.
        device, dtype: of the parameters; float32, bfloat16, float16 or float64.

    Attributes:
        W_dec: parameter ``[d_sae, d_in]``; at first random rows of unit norm.
        W_enc: ``[d_in, d_sae]``; a parameter (at first W_dec transposed), or a view of W_dec where
            tied. In memory it is feature-major: column f is contiguous.
        b_enc, b_dec: parameters ``[d_sae]`` and ``[d_in]``, at first zero.
        W_skip: parameter ``[d_in, d_in]`` (of output numbers by input numbers), at first zero; None
            without a skip connection.
        threshold: buffer, float32, ``[]`` or ``[d_sae]``: in mode threshold the codes are what
            exceeds it. Negative: not calibrated yet.
        sparse_grad: where True, a backward pass leaves the gradients of W_enc and W_dec at
            ``parameter.factored_grad`` (a :class:`r1sae_fast.optim.FactoredGradient`, never written
            out as a matrix) instead of ``.grad``, for :class:`r1sae_fast.optim.Adam` and
            :func:`r1sae_fast.optim.clip_grad_norm_`; float32 on the CPU. It keeps x and the
            reconstruction's gradient until the step, so neither may be written to before.
        decoder_copy: None (at first), ``torch.float16`` or ``torch.bfloat16``: then :meth:`decode`
            of a float32 SAE on the CPU reads a copy of W_dec in that dtype, half as many bytes, and
            so do the values' gradients. It rounds weights to 11 or 8 bits. Not used where W_dec
            itself gets a gradient.
        metadata: free JSON data, saved with the weights (model, hook point, ...).
        screen: how :meth:`encode_sparse` computes: ``"auto"`` (at first), ``"int8"``, ``"bf16"`` or
            ``"none"``, as :class:`ops.Screen` has them; :meth:`explain` tells what that comes to.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of range (k above d_sae among them).
    """

    W_enc: Tensor
    W_dec: nn.Parameter
    b_enc: nn.Parameter
    b_dec: nn.Parameter
    W_skip: nn.Parameter | None
    threshold: Tensor
    screen: ops.ScreenKind
    decoder_copy: torch.dtype | None

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        mode: Mode = "batch_topk",
        *,
        tied: bool = False,
        transcoder: bool = False,
        skip_connection: bool = False,
        check_finite: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = SaeConfig(d_in, d_sae, k, mode, tied, transcoder, skip_connection)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        check_dtype(dtype)

        def empty(*shape: int) -> Tensor:
            return empty_weights(*shape, device=device, dtype=dtype)

        encoder = None if tied else empty(d_sae, d_in).T
        skip = empty(d_in, d_in) if skip_connection else None
        self._set_up(config, empty(d_sae, d_in), empty(d_sae), empty(d_in), encoder, None, skip)
        self.check_finite = check_finite
        self.reset_parameters()

    @classmethod
    def from_tensors(
        cls,
        config: SaeConfig,
        W_dec: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        W_enc: Tensor | None = None,
        threshold: Tensor | None = None,
        W_skip: Tensor | None = None,
    ) -> FastSAE:
        """An SAE around these very tensors: no copy, no random numbers.

        Args:
            config: sizes, k, mode, tying.
            W_dec, b_enc, b_dec: ``[d_sae, d_in]``, ``[d_sae]``, ``[d_in]``, one dtype and device.
            W_enc: ``[d_in, d_sae]``, unless tied; best feature-major (the transpose of a
                contiguous tensor).
            threshold: ``[]`` or ``[d_sae]``; default not calibrated.
            W_skip: ``[d_in, d_in]``, where there is a skip connection.

        Raises:
            TypeError: a dtype that no SAE has.
            ValueError: a shape that doesn't fit ``config``, or several dtypes or devices.
        """
        check_parameters(config, W_dec, b_enc, b_dec, W_enc, threshold, W_skip)
        sae = cls.__new__(cls)
        nn.Module.__init__(sae)
        sae._set_up(config, W_dec, b_enc, b_dec, W_enc, threshold, W_skip)
        return sae

    def _set_up(
        self,
        config: SaeConfig,
        W_dec: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        W_enc: Tensor | None,
        threshold: Tensor | None,
        W_skip: Tensor | None,
    ) -> None:
        self._config = config
        self.check_finite = True
        self.screen = "auto"
        self._screen: ops.Screen | None = None
        self.decoder_copy = None
        self._copy: ops.DecoderCopy | None = None
        self.sparse_grad = False
        self.metadata: dict[str, Any] = {}
        if threshold is None:
            threshold = torch.full((), _UNSET, device=W_dec.device)
        self.register_buffer("threshold", threshold.to(torch.float32))
        self.W_dec = nn.Parameter(W_dec)
        if W_enc is not None:
            self.W_enc = nn.Parameter(W_enc)
        self.b_enc = nn.Parameter(b_enc)
        self.b_dec = nn.Parameter(b_dec)
        self.register_parameter("W_skip", None if W_skip is None else nn.Parameter(W_skip))

    def reset_parameters(self) -> None:
        """Random unit rows of W_dec (torch's global generator), W_enc its transpose, no biases."""
        with torch.no_grad():
            self.W_dec.normal_()
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))
            if not self.tied:
                self.W_enc.copy_(self.W_dec.T)
            self.b_enc.zero_()
            self.b_dec.zero_()
            if self.W_skip is not None:
                self.W_skip.zero_()

    # -- what it is ---------------------------------------------------------------------------

    @property
    def config(self) -> SaeConfig:
        """Sizes, k, mode and tying."""
        return self._config

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self._config.d_in

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self._config.d_sae

    @property
    def tied(self) -> bool:
        """Whether W_enc is a view of W_dec."""
        return self._config.tied

    @property
    def transcoder(self) -> bool:
        """Whether it makes another activation than it reads."""
        return self._config.transcoder

    @property
    def k(self) -> int:
        """Codes a row; see the class."""
        return self._config.k

    @k.setter
    def k(self, k: int) -> None:
        self._config = replace(self._config, k=k)

    @property
    def mode(self) -> Mode:
        """How pre-activations become codes."""
        return self._config.mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self._config = replace(self._config, mode=mode)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.W_dec.device

    def extra_repr(self) -> str:
        config = self._config
        return (
            f"d_in={config.d_in}, d_sae={config.d_sae}, k={config.k}, mode={config.mode!r}, "
            f"tied={config.tied}, "
            + "".join(
                f"{name}=True, "
                for name in ("transcoder", "skip_connection")
                if getattr(config, name)
            )
            + f"dtype={self.dtype}, device={str(self.device)!r}"
        )

    # -- what it does -------------------------------------------------------------------------

    def pre_activations(self, x: Tensor) -> Tensor:
        """``x @ W_enc + b_enc``, ``[..., d_sae]``; x is cast to the parameters' dtype.

        Raises:
            TypeError: x is not a floating tensor.
            ValueError: x has another width than d_in, or lies on another device.
        """
        x = self._checked("x", x, self.d_in, "d_in")
        # Two steps, each rounded, as the release does: fusing them moves bf16 codes.
        return x @ self.W_enc + self.b_enc

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        """The codes of ``x [..., d_in]``, strongest first in each row, ties by lower feature.

        Differentiable in x, W_enc and b_enc, through the chosen codes.

        Raises:
            TypeError, ValueError: as :meth:`pre_activations`; mode threshold without calibration.
            NonFiniteError: a row holds NaN or an infinity (unless check_finite is off).
        """
        if self.sparse_grad and torch.is_grad_enabled():
            return self._encode_in_factors(x)
        return self._encode(x, self.mode)

    def explain(self) -> ops.ScreenReport:
        """Which way codes are computed, why, and what it took so far: ``print(sae.explain())``."""
        screen = self._screen_of(self.W_enc)
        if screen is None:
            reason = f"the parameters lie on {self.device}; plain torch serves there"
            return ops.ScreenReport("none", "", reason, 0, 0, 0, 0, 0)
        return screen.explain()

    def encode(self, x: Tensor) -> Tensor:
        """As :meth:`encode_sparse`, dense: ``[..., d_sae]``."""
        return self.encode_sparse(x).to_dense()

    def decode(self, codes: SparseCodes | Tensor) -> Tensor:
        """``codes @ W_dec + b_dec``, ``[..., d_in]`` (without a skip connection's part, which codes
        don't tell: that is :meth:`forward`'s); codes are cast to the parameters' dtype.

        Args:
            codes: SparseCodes, or a dense tensor ``[..., d_sae]``.

        Raises:
            TypeError: not floating.
            ValueError: of another number of features, or on another device.
        """
        if isinstance(codes, SparseCodes):
            if codes.d_sae != self.d_sae:
                raise ValueError(f"the codes have d_sae {codes.d_sae}; expected {self.d_sae}")
            codes = codes.to(self.dtype)
            if self.sparse_grad and torch.is_grad_enabled():
                leave = self._leave_at(self.W_dec)
                return ops.decode_in_factors(codes, self.W_dec, self.b_dec, leave)
            return ops.decode(codes, self._decoder(), self.b_dec)
        return self._checked("codes", codes, self.d_sae, "d_sae") @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> tuple[Tensor, SparseCodes]:
        """``(reconstruction [..., d_in], codes)``."""
        codes = self.encode_sparse(x)
        reconstruction = self.decode(codes)
        if self.W_skip is not None:
            reconstruction = reconstruction + x.to(self.dtype) @ self.W_skip.T
        return reconstruction, codes

    @torch.no_grad()
    def calibrate_threshold(self, batches: Tensor | Iterable[Tensor]) -> float:
        """Sets :attr:`threshold` so that rows get k codes on average, and returns it.

        It is the mean over the batches of batch top-k's weakest code (Bussmann et al.,
        arXiv 2412.06410), less one unit in the last place: one batch keeps the codes it had.

        Args:
            batches: ``x [..., d_in]``, or several.

        Raises:
            ValueError: no rows at all; else as :meth:`encode_sparse`.
        """
        weakest = []
        for x in [batches] if isinstance(batches, Tensor) else batches:
            codes = self._encode(x, "batch_topk")
            if codes.rows:
                full = codes.nnz > 0 and codes.nnz == self.k * codes.rows
                weakest.append(float(codes.values.min()) if full else 0.0)
        if not weakest:
            raise ValueError("no rows to calibrate on; give at least one row of activations")
        mean = torch.tensor(sum(weakest) / len(weakest), dtype=torch.float32)
        bound = mean.nextafter(torch.zeros(()))
        self.threshold = bound.to(self.device)
        return float(bound)

    # -- files --------------------------------------------------------------------------------

    def save(self, directory: str | PathLike[str]) -> None:
        """Writes ``sae.safetensors`` and ``config.json``; what was there stays until both are done.

        Raises:
            OSError: the folder can't be made or written.
        """
        from r1sae_fast.checkpoints import native

        native.save(self, directory)

    @classmethod
    def load(
        cls,
        directory: str | PathLike[str],
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> FastSAE:
        """Reads what :meth:`save` wrote; ``dtype`` None keeps the saved one.

        Raises:
            FileNotFoundError: no such folder.
            CheckpointError: incomplete or damaged; names the file or the tensor.
        """
        from r1sae_fast.checkpoints import native

        return native.load(directory, device, dtype)

    @classmethod
    def from_pretrained(
        cls,
        repo_or_path: str | PathLike[str],
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        cache_dir: str | PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> FastSAE:
        """Reads an SAE from a folder, or from a repository of the Hugging Face hub.

        A repository holds what :meth:`save` writes. Goodfire's own is known too:
        ``from_pretrained("Goodfire/DeepSeek-R1-SAE-l37", subfolder="math")`` (or ``"logic"``).

        Raises:
            CheckpointError: offline, missing, gated or damaged; says which, and what to do.
        """
        from r1sae_fast.checkpoints import hub

        return hub.load(
            repo_or_path,
            hub.Source(subfolder, revision, cache_dir, local_files_only, token),
            device,
            dtype,
        )

    # -- inner parts --------------------------------------------------------------------------

    def _screen_of(self, W_enc: Tensor) -> ops.Screen | None:
        """The screen of the parameters as they are; None where there can be none."""
        known = W_enc.device.type == "cpu" or _device.on_gpu(W_enc)
        if not known or torch.compiler.is_compiling():
            return None
        W, b = W_enc.detach().T, self.b_enc.detach()
        screen = self._screen
        if screen is None or not screen.is_of(W, b, self.screen):
            changes = ops.RowChanges(self.d_sae)
            screen = self._screen = ops.Screen(W, b, self.screen, changes=changes)
            # Our Adam notes there which features it moves: only those are rounded again.
            owner = self.W_dec if self.tied else W_enc
            owner.row_changes = changes  # type: ignore[attr-defined]  # ours
        return screen

    def _decoder(self) -> Tensor:
        """W_dec, or its copy in 16 bits."""
        W, dtype = self.W_dec, self.decoder_copy
        if dtype is None:
            return W
        if self._copy is None or self._copy.dtype != dtype:
            self._copy = ops.DecoderCopy(dtype)
        on_cpu = W.device.type == "cpu" and W.dtype == torch.float32
        learns = torch.is_grad_enabled() and W.requires_grad
        # Changes of inference tensors aren't counted.
        if not on_cpu or learns or W.is_inference() or torch.compiler.is_compiling():
            return W
        return self._copy.of(W)

    def _encode(self, x: Tensor, mode: Mode) -> SparseCodes:
        x = self._checked("x", x, self.d_in, "d_in")
        screen = self._screen_of(self.W_enc)
        try:
            if screen is None or screen.kind == "none":
                return self._encode_whole(x, mode)
            codes = self._screened(screen, x, mode)
        except NonFiniteError as error:
            raise explained(error, x, self.dtype) from None
        return ops.with_gradient(codes, x, self.W_enc.T, self.b_enc)

    def _screened(self, screen: ops.Screen, x: Tensor, mode: Mode) -> SparseCodes:
        check = self.check_finite
        if mode == "topk":
            return screen.topk(x, self.k, check_finite=check)
        if mode == "batch_topk":
            return screen.batch_topk(x, self.k, check_finite=check)
        return screen.threshold(x, self._calibrated(), check_finite=check)

    def _calibrated(self) -> Tensor:
        if bool((self.threshold < 0).any()):
            raise ValueError(
                "threshold is negative, so not calibrated yet; "
                "call calibrate_threshold(activations) or set sae.threshold"
            )
        return self.threshold

    def _encode_whole(self, x: Tensor, mode: Mode) -> SparseCodes:
        """Without a screen: on a GPU one operation, on the CPU dense pre-activations."""
        check = self.check_finite
        if _device.on_gpu(x):
            given = (x, self.W_enc.T, self.b_enc)
            if mode == "topk":
                return ops.encode_topk(*given, self.k, check_finite=check)
            if mode == "batch_topk":
                return ops.encode_batch_topk(*given, self.k, check_finite=check)
            return ops.encode_threshold(*given, self._calibrated(), check_finite=check)
        pre_activations = x @ self.W_enc + self.b_enc
        if mode == "topk":
            return ops.topk(pre_activations, self.k, check_finite=check)
        if mode == "batch_topk":
            return ops.batch_topk(pre_activations, self.k, check_finite=check)
        return ops.threshold(pre_activations, self._calibrated(), check_finite=check)

    def _encode_in_factors(self, x: Tensor) -> SparseCodes:
        with torch.no_grad():
            codes = self.encode_sparse(x)
        leave = self._leave_at(self.W_dec if self.tied else self.W_enc)
        x = self._checked("x", x, self.d_in, "d_in")
        return ops.encode_in_factors(codes, x, self.W_enc.T, self.b_enc, leave)

    def _leave_at(self, parameter: Tensor) -> Leave:
        if self.dtype != torch.float32 or self.device.type != "cpu":
            raise TypeError(
                f"sparse_grad with parameters of {self.dtype} on {self.device}; "
                "expected float32 on the CPU: move the SAE or set sparse_grad to False"
            )
        return leave_at(parameter, self.d_sae, self.d_in)

    def _checked(self, name: str, x: Tensor, width: int, width_name: str) -> Tensor:
        check_input(name, x, width, width_name, self.dtype, self.device)
        return x.to(self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes a screen and a decoder copy of its own parameters.
        return {**self.__dict__, "_screen": None, "_copy": None}

    def __getattr__(self, name: str) -> Any:
        # Called for what is no plain attribute; a tied SAE has no parameter of this name.
        if name == "W_enc" and self._config.tied:
            return self.W_dec.T
        return super().__getattr__(name)

    def _apply(self, fn: Any, recurse: bool = True) -> FastSAE:
        threshold = self.threshold
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        # Module.to(bfloat16) would round the threshold, and move codes.
        if self.threshold.dtype != threshold.dtype:
            self.threshold = threshold.to(self.threshold.device)
        return self
